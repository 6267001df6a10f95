/** Whatever a file holds, its reader returns a topology that is a tree, or throws the coded error. */
import * as fc from 'fast-check';
import { expect, test } from 'vitest';
import { MigrationError } from '../../../../src/domain/errors.js';
import { readTopology } from '../../../../src/planner/fanout/read-topology.js';
import { relayTree } from '../../../../src/planner/fanout/relay-tree.js';
import { switchesAbove } from './topologies.js';

const WORDS = [
  ...[
    'SwitchName=',
    'Switches=',
    'Nodes=',
    'LinkSpeed=',
    'switchname = ',
    'a',
    'b',
    's[0-3]',
    'n[01-12,20]',
    'x7',
    '"',
  ],
  ...['[', ']', ',', '-', '=', '#', '\\', '\\\n', '\n', ' ', '\t', '\r\n', '99999999999', '[1][2]', '\u0000', 'é', '5'],
];
const YAML_WORDS = [
  ...['switches:', 'root: ', '- ', 'name: ', 'hosts: ', 'linkMbitPerS: ', 'topology: ', 'tree:', 'switch: ', 'nodes: '],
  ...[
    'children: ',
    '\n',
    '\n  ',
    '\n    ',
    '{',
    '}',
    '[',
    ']',
    ', ',
    ': ',
    '"',
    "'",
    '&a ',
    '*a',
    '!x ',
    '|',
    '>',
    '? ',
  ],
  ...['a', 'b', 'n[1-3]', '7', 'true', '~', '---', '#', '%', '<<: ', '1e9', '__proto__: ', 'constructor: '],
];

const textOf = (words: readonly string[]) =>
  fc.oneof(
    fc.array(fc.constantFrom(...words), { maxLength: 60 }).map((parts) => parts.join('')),
    fc.string({ maxLength: 200, unit: 'binary' }),
  );

async function check(name: string, text: string): Promise<void> {
  try {
    const topology = await readTopology({ name, text, hosts: [] });
    const [root = '', ...hosts] = topology.hosts.keys();
    expect(root).not.toBe('');
    for (const host of [root, ...hosts]) expect(switchesAbove(topology, host).length).toBeLessThanOrEqual(20);
    expect(relayTree({ topology, root, hosts, degree: 2 }).parents.size).toBe(hosts.length);
  } catch (error) {
    if (!(error instanceof MigrationError)) throw error;
    expect(error.code).toBe('SPEC_INVALID');
    expect(error.message.length).toBeLessThan(500);
  }
}

test("any text as Slurm's topology.conf", async () => {
  await fc.assert(
    fc.asyncProperty(textOf(WORDS), (text) => check('topology.conf', text)),
    { numRuns: 2000 },
  );
});

test('any text as YAML', async () => {
  await fc.assert(
    fc.asyncProperty(textOf(YAML_WORDS), (text) => check('t.yaml', text)),
    { numRuns: 2000 },
  );
});

/**
 * Longer than a file may be. Each would take minutes if its reader compared all with all, or built what it must refuse.
 */
test('texts that are made to take long', async () => {
  const size = 600_000;
  const filled = (part: string): string => part.repeat(Math.floor(size / part.length));
  const texts = [
    '[',
    '[1]',
    '[1-65536][1]',
    'a ',
    'a=',
    '\\\n',
    '"',
    'SwitchName=a Nodes=a\n',
    ',',
    '\\',
    '#',
    '\n',
    ' ',
  ];
  for (const part of texts) {
    await check('topology.conf', filled(part));
    await check('topology.conf', `SwitchName=a Nodes=${filled(part)}`);
  }
  await check('topology.conf', `SwitchName=a Nodes=[1-65536]${'[1]'.repeat(200_000)}`);
  for (const part of ['[', '{a: ', '- ', '? ', '!x ', '&a ', '%x\n']) await check('t.yaml', filled(part));
});

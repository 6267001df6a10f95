import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../../src/domain/errors.js';
import { readTopology } from '../../../../src/planner/fanout/read-topology.js';
import { TOPOLOGY_BYTES_MAX, TOPOLOGY_NAMES_MAX, type Topology } from '../../../../src/planner/fanout/topology.js';

const read = (name: string, text: string, hosts: readonly string[] = []): Promise<Topology> =>
  readTopology({ name, text, hosts });
const conf = (text: string, hosts?: readonly string[]) => read('topology.conf', text, hosts);
const yaml = (text: string, hosts?: readonly string[]) => read('net.yaml', text, hosts);

/** Switch by switch: its name, the one above, its hosts. */
function described({ switches, hosts }: Topology): string[] {
  return switches.map(({ name, parent }, index) => {
    const own = [...hosts].filter(([, { leaf }]) => leaf === index).map(([host]) => host);
    return [name, parent === null ? '-' : switches[parent]?.name, ...own].join(' ');
  });
}

async function mistakeOf(reading: Promise<Topology>): Promise<{ message: string; details: unknown }> {
  const error: unknown = await reading.then(
    () => null,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof MigrationError)) throw new Error(`no coded error, but ${String(error)}`, { cause: error });
  expect(error.code).toBe('SPEC_INVALID');
  expect(error.remedy).not.toBe('');
  return { message: error.message, details: error.details };
}

describe("Slurm's topology.conf", () => {
  test("is read as Slurm's own parser reads it", async () => {
    const text = [
      '# two racks',
      'switchname=s0 NODES=dev[0-2],gpu7   # a comment',
      'SwitchName = s1  Nodes = "dev[08-10], x" LinkSpeed=100',
      '',
      'SwitchName=top \\  # the line goes on',
      '  Switches=s[0-1]',
      'SwitchName=far Nodes=r[0-1]n[1-2],\\',
      'b[1,3-4]-ib LinkSpeed=UNLIMITED',
    ].join('\r\n');
    const topology = await conf(text, ['dev1', 'x']);
    expect(described(topology)).toEqual([
      's0 top dev0 dev1 dev2 gpu7',
      's1 top dev08 dev09 dev10 x',
      'top -',
      'far - r0n1 r0n2 r1n1 r1n2 b1-ib b3-ib b4-ib',
    ]);
    expect(topology.switches.map(({ linkSpeed }) => linkSpeed)).toEqual([null, 100, null, null]);
    expect(topology.linkSpeedUnit).toBe('arbitrary');
  });

  test('may name a switch below one that comes later, and a host twice at one switch', async () => {
    expect(described(await conf('SwitchName=a Switches=b,b\nSwitchName=b Nodes=n[1-2],n2'))).toEqual([
      'a -',
      'b a n1 n2',
    ]);
  });

  const MISTAKES: readonly [string, string, number | null, RegExp][] = [
    [
      'a circle',
      'SwitchName=a Switches=b\nSwitchName=b Switches=c\nSwitchName=c Switches=a',
      1,
      /a circle of switches: /,
    ],
    ['a switch below itself', 'SwitchName=a Switches=a', 1, /a circle of switches: a below a/],
    ['a switch twice', 'SwitchName=a Nodes=x\n\nSwitchName=a Nodes=y', 3, /switch a, which line 1 has/],
    [
      'a switch with two parents',
      'SwitchName=a Switches=c\nSwitchName=b Switches=c\nSwitchName=c Nodes=x',
      2,
      /switch c below b, and below a/,
    ],
    ['a host at two switches', 'SwitchName=a Nodes=x[1-3]\nSwitchName=b Nodes=x3', 2, /host x3 at switch b, and at a/],
    ['a switch that is not there', 'SwitchName=a Switches=b', 1, /b below switch a; expected a switch that/],
    ['an empty switch', 'SwitchName=a Nodes=x\nSwitchName=b', 2, /nothing at switch b/],
    ['an empty switch', 'SwitchName=a Nodes=""', 1, /nothing at switch a/],
    ['switches and hosts', 'SwitchName=a Nodes=x\nSwitchName=b Nodes=y Switches=a', 2, /either switches or hosts/],
    ['another plugin', '# x\nBlockName=a Nodes=x', 2, /the key BlockName; expected SwitchName=NAME/],
    ['an order that Slurm refuses', 'Nodes=x SwitchName=a', 1, /the key Nodes/],
    ['a key twice', 'SwitchName=a Nodes=x Nodes=y', 1, /Nodes twice/],
    ['no pair', 'SwitchName=a Nodes=x y', 1, /found y; expected SwitchName/],
    ['a quote without an end', 'SwitchName=a Nodes="x', 1, /found Nodes="x; expected/],
    ['a name with brackets', 'SwitchName=s[0-1] Nodes=x', 1, /SwitchName=s\[0-1\]; expected a name/],
    ['a range downwards', 'SwitchName=a Nodes=x[3-1]', 1, /the range 3-1 in x\[3-1\]/],
    ['a range of letters', 'SwitchName=a Nodes=x[a-b]', 1, /the range a-b/],
    ['an empty range', 'SwitchName=a Nodes=x[]', 1, /the range {2}in/],
    ['a bracket without an end', 'SwitchName=a Nodes=x[1-2', 1, /\[ without \]/],
    ['a bracket without a beginning', 'SwitchName=a Nodes=x1]', 1, /\] without \[/],
    ['brackets in brackets', 'SwitchName=a Nodes=x[1[2]]', 1, /\[ within brackets/],
    ['too long a name', `SwitchName=a Nodes=${'x'.repeat(65)}`, 1, /the name x+; expected a name of at most 64/],
    ['a speed that is no number', 'SwitchName=a Nodes=x LinkSpeed=fast', 1, /LinkSpeed=fast/],
    ['a speed that is too large', 'SwitchName=a Nodes=x LinkSpeed=4294967296', 1, /LinkSpeed=4294967296/],
    ['more names than allowed', 'SwitchName=a Nodes=x[1-999999999]', 1, /at most 65536 names/],
    ['more names in many lines', 'SwitchName=a Nodes=x[1-65536]\nSwitchName=b Nodes=y', 2, /more names by y/],
    ['more names by two ranges', 'SwitchName=a Nodes=x[1-9999][1-9999][1-9999]', 1, /at most 65536 names/],
    ['nothing', '# nothing', null, /no switch; expected at least one/],
    [
      'too many levels',
      Array.from({ length: 21 }, (_, n) => `SwitchName=s${n} ${n === 20 ? 'Nodes=x' : `Switches=s${n + 1}`}`).join(
        '\n',
      ),
      21,
      /21 switches above each other; expected at most 20/,
    ],
  ];

  test.each(MISTAKES)('with %s is refused', async (_, text, line, found) => {
    const { message, details } = await mistakeOf(conf(text));
    expect(message).toMatch(found);
    expect(message).toMatch(/^topology\.conf.*: found .*; expected /);
    expect(details).toEqual(line === null ? { file: 'topology.conf' } : { file: 'topology.conf', line });
  });

  test('that lacks hosts of the fork is refused, and they are named', async () => {
    const { message } = await mistakeOf(conf('SwitchName=a Nodes=x', ['x', 'b', 'c', 'b', 'd', 'e', 'f', 'g']));
    expect(message).toMatch(/no switch that has b, c, d, e, f and 1 more; expected every host/);
  });

  test('says the first of the lines that a mistake is in', async () => {
    const text = 'SwitchName=a \\\n  Nodes=x \\\n  Bad=1\nSwitchName=b Nodes=y';
    expect((await mistakeOf(conf(text))).details).toEqual({ file: 'topology.conf', line: 1 });
  });

  test('shows no control characters of the file', async () => {
    const { message } = await mistakeOf(conf('SwitchName=a \u001b[2JNodes=x'));
    expect(message).not.toContain('\u001b');
  });
});

describe('a topology in YAML', () => {
  test('has switches with hosts or switches, link speeds, and perhaps a root', async () => {
    const text = [
      'root: core',
      'switches:',
      '  - name: core',
      '    switches: [leaf1, "leaf[2-3]"]',
      '  - { name: leaf1, hosts: [a, 7], linkMbitPerS: 100000 }',
      '  - { name: leaf2, hosts: "b[1-2]" }',
      '  - name: leaf3',
      '    hosts:',
      '      - c1',
      '      - { name: "c[2-3]", linkMbitPerS: 25000 }',
    ].join('\n');
    const topology = await yaml(text, ['a', 'c3']);
    expect(described(topology)).toEqual(['core -', 'leaf1 core a 7', 'leaf2 core b1 b2', 'leaf3 core c1 c2 c3']);
    expect(topology.switches.map(({ linkSpeed }) => linkSpeed)).toEqual([null, 100_000, null, null]);
    expect(topology.hosts.get('c1')?.linkSpeed).toBeNull();
    expect(topology.hosts.get('c3')?.linkSpeed).toBe(25_000);
    expect(topology.linkSpeedUnit).toBe('mbitPerS');
  });

  test("may be Slurm's topology.yaml, of which the default tree counts", async () => {
    const text = [
      '---',
      '- topology: blocks',
      '  block: { block_sizes: [4], blocks: [{ block: b1, nodes: "n[1-4]" }] }',
      '- topology: first',
      '  cluster_default: false',
      '  tree: { switches: [{ switch: other, nodes: n1 }] }',
      '- topology: second',
      '  cluster_default: True',
      '  tree:',
      '    switches:',
      '    - switch: top',
      '      children: s[1-2]',
      '    - switch: s1',
      '      nodes: n[01-02]',
      '    - switch: s2',
      '      nodes: n[03-04]',
    ];
    expect(described(await yaml(text.join('\n')))).toEqual(['top -', 's1 top n01 n02', 's2 top n03 n04']);
    expect(described(await yaml(text.slice(0, 6).join('\n')))).toEqual(['other - n1']);
  });

  const MISTAKES: readonly [string, string, number | null, RegExp][] = [
    ['a mistake of YAML', 'switches:\n  - [', 2, /a mistake in the YAML/],
    ['a key that comes twice', 'switches:\n  - name: a\n    name: b', 3, /the key name comes twice/],
    ['nothing', '', 1, /found null; expected a map with root, switches/],
    ['an unknown key', 'switches: []\nswitch: []', 2, /the key switch; expected a map with root, switches/],
    ['an unknown key of a switch', 'switches:\n- name: a\n  nodes: [x]', 3, /the key nodes/],
    ['no list', 'switches: { a: 1 }', 1, /a map; expected a list of switches/],
    ['no name', 'switches:\n- hosts: [x]', 2, /found nothing; expected a name/],
    ['a name that is none', 'switches:\n- name: [a]', 2, /a list; expected a name/],
    ['a host that is none', 'switches:\n- name: a\n  hosts:\n  - x\n  - true', 5, /true; expected a name/],
    ['a speed of nothing', 'switches:\n- name: a\n  hosts: [x]\n  linkMbitPerS: 0', 4, /0; expected a number of Mbit/],
    ['a host at two switches', 'switches:\n- name: a\n  hosts: [x]\n- name: b\n  hosts: [x]', 4, /host x at switch b/],
    [
      'another root',
      'root: a\nswitches:\n- { name: a, hosts: [x] }\n- { name: b, hosts: [y] }',
      4,
      /b, which is below no/,
    ],
    ['a root that is not there', 'root: c\nswitches:\n- { name: a, hosts: [x] }', 1, /c as the root/],
    ['no tree', '- topology: t\n  flat: true', 1, /no topology with a tree/],
    ['an unknown key of Slurm', '- topology: t\n  mesh: true', 2, /the key mesh/],
  ];

  test.each(MISTAKES)('with %s is refused', async (_, text, line, found) => {
    const { message, details } = await mistakeOf(yaml(text));
    expect(message).toMatch(found);
    expect(details).toEqual(line === null ? { file: 'net.yaml' } : { file: 'net.yaml', line });
  });
});

describe('a large topology', () => {
  test('of ten thousand hosts is read in either format', async () => {
    const racks = Array.from({ length: 320 }, (_, rack) => `n${rack}x[00-31]`);
    const inConf = ['SwitchName=top Switches=s[0-319]', ...racks.map((hosts, n) => `SwitchName=s${n} Nodes=${hosts}`)];
    expect((await conf(inConf.join('\n'))).hosts.size).toBe(10_240);
    const written = racks.map((_, rack) => Array.from({ length: 32 }, (__, n) => `n${rack}x${n}`));
    const inYaml = written.map((hosts, n) => `- { name: s${n}, hosts: [${hosts.join(', ')}] }`);
    expect((await yaml(`switches:\n${inYaml.join('\n')}`)).hosts.size).toBe(10_240);
  });

  test('with as many switches in a line, a star or a circle as are allowed is judged in one pass', async () => {
    const count = TOPOLOGY_NAMES_MAX / 2;
    const star = `SwitchName=top Switches=s[1-${count - 1}]\n`;
    const leaves = Array.from({ length: count - 1 }, (_, n) => `SwitchName=s${n + 1} Nodes=h${n}\n`);
    expect((await conf(star + leaves.join(''))).hosts.size).toBe(count - 1);
    const line = Array.from({ length: 20_000 }, (_, n) => `SwitchName=s${n} Switches=s${n + 1}\n`);
    await mistakeOf(conf(`${line.join('')}SwitchName=s20000 Nodes=x`));
    expect((await mistakeOf(conf(`${line.join('')}SwitchName=s20000 Switches=s0`))).message).toMatch(/circle.*…/);
  });

  test('longer than a file may be is refused', async () => {
    expect((await mistakeOf(conf(' '.repeat(TOPOLOGY_BYTES_MAX + 1)))).message).toMatch(
      /1048577 bytes; expected at most/,
    );
  });
});

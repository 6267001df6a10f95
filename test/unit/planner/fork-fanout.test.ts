import { expect, test } from 'vitest';
import type { HeardProbe, MulticastProvider, ProbedGroup } from '../../../src/domain/fanout.js';
import type { ForkRequest } from '../../../src/domain/fork.js';
import { readTopology } from '../../../src/planner/fanout/read-topology.js';
import {
  type FanoutQuestion,
  needsMulticastProbe,
  planFanout,
  RELAY_DEGREE,
} from '../../../src/planner/fork/fanout.js';
import { forkInventory, forkRequest } from './fork-facts.js';

const HOSTS = Array.from({ length: 8 }, (_, index) => `h${index}`);
const GIB = 2 ** 30;

const question: FanoutQuestion = {
  ...{ root: 'A', hosts: HOSTS, transport: 'tcp', topology: null, probes: [] },
  inventory: { ...forkInventory, imageBytesNeeded: 8 * GIB },
};
const heardOf = (deaf: readonly string[], largestBytes = 1500): HeardProbe[] =>
  HOSTS.map((host) => ({ host, largestBytes: deaf.includes(host) ? 0 : largestBytes }));
const by = (provider: MulticastProvider, heard: readonly HeardProbe[]): ProbedGroup[] => [{ provider, heard }];
const plan = (request: Partial<ForkRequest>, change: Partial<FanoutQuestion> = {}) =>
  planFanout({ ...forkRequest, ...request }, { ...question, ...change });

test('auto sends a large image to many hosts as a multicast, if it gets to all, else through relays', () => {
  const multicast = plan({}, { probes: by('udp', heardOf([])) }).plan;
  expect(multicast).toMatchObject({ kind: 'multicast', datagramBytesMax: 1500 });
  expect(multicast?.near.map(({ host }) => host)).toEqual(HOSTS);
  expect(plan({}, { probes: by('udp', heardOf(['h3'])) }).plan).toMatchObject({
    kind: 'tree',
    reason: expect.stringContaining('h3'),
  });
  expect(plan({}).plan?.kind).toBe('tree');
});

test('the datagrams are as large as all hosts can hear', () => {
  const heard = [...heardOf([], 9000).slice(0, 7), { host: 'h7', largestBytes: 1500 }];
  expect(plan({ fanout: 'multicast' }, { probes: by('udp', heard) }).plan?.datagramBytesMax).toBe(1500);
});

test.each([
  ['few hosts', { hosts: ['h0', 'h1', 'h2'] }],
  ['hosts that read by RDMA', { transport: 'rdma' as const }],
])('%s read from the root unless something else is asked for, and are not probed', (_, few) => {
  expect(plan({}, { ...few, probes: by('udp', heardOf([])) }).plan).toMatchObject({ kind: 'unicast', near: [] });
  expect(plan({ fanout: 'tree' }, few).plan?.kind).toBe('tree');
  expect(needsMulticastProbe(forkRequest, { ...question, ...few })).toBe(false);
  expect(needsMulticastProbe(forkRequest, question)).toBe(true);
});

test('to hosts that read by RDMA a multicast goes by RDMA, if all of them hear it, else by UDP', () => {
  const rdma = { transport: 'rdma' as const };
  const verbs = by('verbs', heardOf([], 4148));
  expect(plan({ fanout: 'multicast' }, { ...rdma, probes: verbs }).plan).toMatchObject({
    ...{ kind: 'multicast', provider: 'verbs', datagramBytesMax: 4148, reason: 'asked for' },
  });
  const some = by('verbs', heardOf(['h3'], 4148));
  expect(plan({ fanout: 'multicast' }, { ...rdma, probes: [...some, ...by('udp', heardOf([]))] }).plan).toMatchObject({
    ...{ kind: 'multicast', provider: 'udp', datagramBytesMax: 1500 },
    reason: expect.stringMatching(/by UDP, because .* h3$/),
  });
  const probes = [...by('verbs', []), ...by('udp', heardOf(['h2']))];
  expect(plan({ fanout: 'multicast' }, { ...rdma, probes }).refusals).toMatchObject([
    { code: 'MULTICAST_NOT_ROUTED', reason: expect.stringContaining('h2') },
  ]);
  expect(plan({ fanout: 'multicast' }, rdma).plan).toMatchObject({ provider: 'verbs', datagramBytesMax: 0 });
  expect(plan({ fanout: 'multicast' }).plan).toMatchObject({ provider: 'udp' });
});

test('a multicast that was asked for, and does not get to a host, is refused with its name', () => {
  expect(plan({ fanout: 'multicast' }, { probes: by('udp', heardOf(['h2', 'h5'])) }).refusals).toMatchObject([
    { code: 'MULTICAST_NOT_ROUTED', reason: expect.stringMatching(/h2, h5/) },
  ]);
});

test.each(['multicast', 'tree'] as const)(
  '%s is refused for clones that read the image before they start',
  (fanout) => {
    const refused = plan({ fanout, memory: 'private' }, { probes: by('udp', heardOf([])) });
    expect(refused.refusals).toMatchObject([{ code: 'FANOUT_UNAVAILABLE' }]);
    expect(plan({ memory: 'private' }, { probes: by('udp', heardOf([])) }).plan?.kind).toBe('unicast');
  },
);

test('in a tree a rack gets the image once, and a host has its relays in order', async () => {
  const text = 'SwitchName=s1 Nodes=A,h[0-3]\nSwitchName=s2 Nodes=h[4-7]\nSwitchName=top Switches=s[1-2]\n';
  const topology = await readTopology({ name: 'topology.conf', text, hosts: ['A', ...HOSTS] });
  const { plan: tree } = plan({ fanout: 'tree' }, { topology });
  const levels = new Map(tree?.near.map((near) => [near.host, near.levels]));
  const fromRoot = HOSTS.filter((host) => !levels.has(host));
  expect(fromRoot.length).toBeGreaterThan(0);
  expect(fromRoot.length).toBeLessThanOrEqual(RELAY_DEGREE);
  const rackOf = (host: string) => (HOSTS.indexOf(host) < 4 ? 1 : 2);
  const crossings = HOSTS.slice(4).filter((host) => {
    const parent = levels.get(host)?.[0]?.[0];
    return parent === undefined || rackOf(parent) === 1;
  });
  expect(crossings).toHaveLength(1);
  for (const chain of levels.values()) for (const level of chain) expect(level).toHaveLength(1);
});

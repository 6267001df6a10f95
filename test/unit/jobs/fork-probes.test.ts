/** How a multicast is tried before a fork is planned: by what then carries it. */
import { expect, test } from 'vitest';
import type { ForkRequest } from '../../../src/domain/fork.js';
import { onHosts, scriptedHosts } from '../engine/on-hosts.js';
import { restFork } from '../engine/scripted.js';

const multicast: ForkRequest = { ...onHosts, fanout: 'multicast' };

/** What the joining host is told, and the providers that were tried. `deaf`: the providers that C does not hear. */
async function planned(request: ForkRequest, deaf: readonly string[] = []) {
  const world = scriptedHosts();
  const tried: string[] = [];
  world.on['A.probeMulticast'] = (hosts: string[], _hearMs: number, provider: string) => {
    tried.push(provider);
    return hosts.map((host) => ({ host, largestBytes: host === 'C' && deaf.includes(provider) ? 0 : 4148 }));
  };
  let told: unknown;
  const prepare = world.on['B.prepareClones']!;
  world.on['B.prepareClones'] = (asked: never) => {
    told = (asked as { fanout?: unknown }).fanout;
    return prepare(asked);
  };
  const { jobs } = await world.daemon();
  const { id } = await jobs.submitFork(request);
  const { state, report } = await restFork(jobs, id);
  expect(state).toBe('done');
  return { tried, told, report };
}

test('hosts that read by RDMA are tried by RDMA, also if the plan chooses it', async () => {
  for (const transport of ['rdma', 'auto'] as const) {
    const { tried, told, report } = await planned({ ...multicast, transport });
    expect(tried).toEqual(['verbs']);
    expect(told).toMatchObject({ kind: 'multicast', provider: 'verbs', datagramBytesMax: 4148 });
    expect(report?.fanout).toMatchObject({ kind: 'multicast', provider: 'verbs' });
  }
});

test('a host that does not hear RDMA multicast makes it UDP, and the report says so', async () => {
  const { tried, told, report } = await planned({ ...multicast, transport: 'rdma' }, ['verbs']);
  expect(tried).toEqual(['verbs', 'udp']);
  expect(told).toMatchObject({ kind: 'multicast', provider: 'udp' });
  expect(report?.fanout?.reason).toMatch(/RDMA multicast does not get to C/);
});

test('hosts that read by TCP are tried by UDP', async () => {
  const { tried, told } = await planned(multicast);
  expect(tried).toEqual(['udp']);
  expect(told).toMatchObject({ kind: 'multicast', provider: 'udp' });
});

/** A fork on the two hosts of an AgentPair, call by call, as a coordinator makes them. */
import { expect } from 'vitest';
import type { ForkOrigin, PrepareForkRequest } from '../../src/engine/ports/fork.js';
import type { AgentHost, AgentPair } from './agent-pair.js';
import { eventually } from './cluster.js';
import { forkRequest } from './fork-host.js';

const FILL_MS = 60_000;

/** How many clones the two hosts make. */
export type Counts = readonly [a: number, b: number];

/** A fork of the VM, by default with one clone on A and two on B, as the coordinator asks for it. */
export class TwoHostFork {
  readonly request: PrepareForkRequest;
  readonly joining: PrepareForkRequest;
  readonly fork: string;

  private constructor(
    private readonly pair: AgentPair,
    request: PrepareForkRequest,
    origin: ForkOrigin,
    private readonly counts: Counts,
  ) {
    const [own, others] = counts;
    this.fork = request.fork;
    this.request = { ...request, share: { first: 0, count: own } };
    this.joining = { ...request, vm: null, share: { first: own, count: others }, origin };
  }

  static async of(
    pair: AgentPair,
    vm: string,
    change: Partial<PrepareForkRequest> = {},
    counts: Counts = [1, 2],
  ): Promise<TwoHostFork> {
    const { a } = pair;
    const request = forkRequest(vm, { cloneCount: counts[0] + counts[1], ...change });
    const { spec, accel, qemuVersion } = a.vms.get(vm);
    const { imageBytesNeeded } = await a.agent.forks.forkInventory(request);
    const allocatedBytes = imageBytesNeeded || spec.memory.sizeBytes;
    const origin = { host: 'A', image: request.fork, spec, accel, qemuVersion, allocatedBytes };
    return new TwoHostFork(pair, request, origin, counts);
  }

  async upToLoad(): Promise<void> {
    const { a, b } = this.pair;
    await a.agent.source.reserve(this.request.vm ?? '', this.request.job);
    const [root, leaf] = await Promise.all([
      a.agent.forks.prepareClones(this.request),
      b.agent.forks.prepareClones(this.joining),
    ]);
    const clones = [...root.clones, ...leaf.clones];
    expect(clones.map(({ index }) => index)).toEqual(Array.from({ length: this.request.cloneCount }, (_, at) => at));
    expect(new Set(clones.map(({ uuid }) => uuid)).size).toBe(clones.length);
    await a.agent.forks.armParent(this.fork);
    await this.connect();
    await a.agent.forks.forkPoint(this.fork);
    await a.agent.forks.sendForkState(this.fork, 'B');
    await Promise.all([a.agent.forks.loadClones(this.fork), b.agent.forks.loadClones(this.fork)]);
  }

  async connect(): Promise<void> {
    await this.pair.b.agent.forks.connectImage(this.fork, 'tcp');
  }

  async commit(): Promise<void> {
    for (const { agent } of [this.pair.a, this.pair.b]) await agent.forks.commitFork(this.fork);
  }

  async run(): Promise<void> {
    const outcomes = await Promise.all([this.pair.a, this.pair.b].map(({ agent }) => agent.forks.runClones(this.fork)));
    expect(outcomes.map(({ ready, failures }) => [ready.length, failures])).toEqual(this.counts.map((n) => [n, []]));
  }

  /** Ends the fork when both images are complete, or are read on demand. The host that serves the image ends last. */
  async finish(hosts: readonly AgentHost[] = [this.pair.b, this.pair.a]): Promise<void> {
    for (const { agent } of hosts) {
      await eventually('the image is complete', FILL_MS, async () => {
        const progress = await agent.forks.forkProgress(this.fork);
        if (progress.state === 'failed') throw new Error(JSON.stringify(progress));
        return progress.state === 'filling' ? undefined : true;
      });
    }
    for (const { agent } of hosts) await agent.forks.finishFork(this.fork);
    if (hosts.includes(this.pair.a)) await this.pair.a.agent.source.unreserve(this.request.vm ?? '', this.request.job);
  }
}

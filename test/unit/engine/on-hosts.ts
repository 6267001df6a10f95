/** Scripted agents that make a fork over several hosts. */
import type { ForkRequest, HostWish } from '../../../src/domain/fork.js';
import type {
  ForkProgress,
  LoadClonesReply,
  PrepareForkReply,
  PrepareForkRequest,
  RunClonesReply,
} from '../../../src/engine/ports/fork.js';
import { filled, forkInventory, forkRequest, identity } from '../planner/fork-facts.js';
import { vm } from '../planner/planner-facts.js';
import { Scripted } from './scripted.js';

const WISHES: readonly HostWish[] = ['A', 'B', 'C'].map((host) => ({ host, cloneCount: 1 }));
export const onHosts: ForkRequest = { ...forkRequest, hosts: WISHES, transport: 'tcp' };

/** Each host makes the clones of its share, and says so. */
export function scriptedHosts(): Scripted {
  const world = new Scripted();
  world.peers = ['A', 'B', 'C'];
  for (const host of world.peers) {
    let indexes: number[] = [];
    const ready = (): RunClonesReply['ready'] => indexes.map((index) => ({ index, atMs: 10 + index }));
    world.on[`${host}.forkInventory`] = () => ({ ...forkInventory, vm: { ...vm, spec: { ...vm.spec, disks: [] } } });
    world.on[`${host}.prepareClones`] = ({ share, origin, fork, cloneCount, image }: PrepareForkRequest) => {
      const { first, count } = share ?? { first: 0, count: cloneCount };
      indexes = Array.from({ length: count }, (_, position) => first + position);
      const clones = indexes.map((index) => identity(index));
      return { image: origin?.image ?? image ?? fork, isWarm: false, clones, failures: [] } satisfies PrepareForkReply;
    };
    world.on[`${host}.runClones`] = () => ({ ready: ready(), failures: [] });
    world.on[`${host}.forkProgress`] = () => progressOf(indexes);
  }
  // A host loads the state in the call that brings it.
  world.on['A.sendForkState'] = (_: string, host: string) => (world.on[`${host}.loadClones`] ?? loaded)();
  return world;
}

const loaded = (): LoadClonesReply => ({ failures: [] });

/** A host that has all pages, and has committed these clones. */
function progressOf(indexes: readonly number[]): ForkProgress {
  const committed = filled.committed!;
  const clones = indexes.map((index) => identity(index));
  return { ...filled, committed: { ...committed, clones, ready: [] } };
}

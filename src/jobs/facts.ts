import { MigrationError, toMigrationError } from '../domain/errors.js';
import { type MigrationOrder, MODE_TRAITS } from '../domain/migration.js';
import { transportRow } from '../domain/transport.js';
import { withDeadline } from '../engine/deadline.js';
import type { Clock } from '../engine/ports/clock.js';
import type { HostPort } from '../engine/ports/host.js';
import type { Registry } from '../engine/ports/registry.js';
import type { PreflightFacts, StorageFacts, TargetFacts } from '../planner/migration/facts.js';
import { seesSocket } from './socket-facts.js';
import { compareStorage } from './storage-facts.js';

/**
 * The shortest time limit for one answer. Nothing has begun and the VM keeps running, so a slow host gets more time
 * than in a call of a running job.
 */
export const ANSWER_MS = 20_000;

export interface FactSources {
  readonly host: string;
  readonly agent: (host: string) => HostPort;
  readonly registry: Registry;
  readonly clock: Clock;
  readonly callMsMax: number;
  /** A file that says which hosts share a switch, for requests that do not. Null: there is none. */
  readonly topologyPath?: string | null;
}

/**
 * Asks both hosts for all facts that pre-flight checks. Throws only if no check is possible: the VM does not exist, or
 * this host itself does not answer.
 */
export async function gatherFacts(
  request: MigrationOrder,
  sources: FactSources,
): Promise<PreflightFacts | { readonly ownerElsewhere: string }> {
  const { host, agent, registry, clock, callMsMax } = sources;
  const source = agent(host).inventory;
  const answerMsMax = Math.max(ANSWER_MS, callMsMax);
  const bounded = <T>(work: Promise<T>, what: string): Promise<T> => withDeadline(clock, work, answerMsMax, what);
  const record = await registry.owner(request.vm);
  if (record !== null && record.owner !== host) return { ownerElsewhere: record.owner };
  const vm = await bounded(source.vmInventory(request.vm), `inspecting ${request.vm}`);
  const sourceHost = await bounded(source.inventory(), `asking ${host}`);
  const { address, port } = sourceHost.rdma;
  const isRdmaWanted =
    MODE_TRAITS[request.mode].mover === 'pager' &&
    (request.transport === 'auto' || transportRow(request.transport).registersMemory);
  const rdmaPlace = isRdmaWanted && address !== null && port !== null ? { host: address, port } : null;
  const askTarget = async (): Promise<TargetFacts> => {
    if (request.target === host) return { kind: 'isSource' };
    try {
      const target = agent(request.target).inventory;
      const [inventory, checks] = await Promise.all([
        bounded(target.inventory(), `asking ${request.target}`),
        bounded(target.checkTarget(vm.spec, rdmaPlace), `asking ${request.target} about the VM's files`),
      ]);
      if (inventory.host !== request.target) {
        throw new MigrationError('PEER_PROTOCOL', `the host at the address of ${request.target} is ${inventory.host}`, {
          remedy: 'correct the peers in the configuration of vmigrated',
        });
      }
      const isAsked = request.sharedStorage !== 'assume' && (vm.state === 'running' || vm.state === 'paused');
      const storage: StorageFacts = isAsked
        ? await compareStorage({ vm: request.vm, source, target, targetHost: request.target, bounded })
        : { kind: 'unasked' };
      const isLocal = request.transport !== 'auto' && transportRow(request.transport).sameMachineOnly;
      const isSocketSeen =
        isLocal && inventory.machineId === sourceHost.machineId
          ? await seesSocket(sourceHost, target, bounded)
          : undefined;
      return {
        ...{ kind: 'reachable', inventory, checks, storage },
        ...(isSocketSeen === undefined ? {} : { isSocketSeen }),
      };
    } catch (error) {
      return { kind: 'unreachable', error: toMigrationError(error) };
    }
  };
  return { sourceHost, target: await askTarget(), vm };
}

/**
 * Things of a host that a spec's own arguments take and that only one VM can have. The process of each clone starts
 * with the arguments of its parent, so clones would want the same. Pure; every layer may import it.
 */
import type { CloneNetwork } from './fork.js';
import type { Refusal } from './refusal.js';
import type { VmSpec } from './vm.js';

export interface HostResource {
  /** The argument as the spec has it. */
  readonly argument: string;
  readonly what: string;
  /** The thing belongs to a network namespace, so that a VM in a namespace of its own can have it too. */
  readonly isOfNetwork: boolean;
}

/** Yields a refusal for each thing that further VMs of the spec cannot have while one has it. */
export function* resourceClashes(
  { name, nics }: Pick<VmSpec, 'name' | 'nics'>,
  network: CloneNetwork,
  resources: readonly HostResource[],
): Iterable<Refusal> {
  // Without such a NIC no network namespace is made.
  const canHaveOwnNetwork = nics.some(({ type }) => type === 'tap' || type === 'isolated');
  const hasOwnNetwork = network === 'isolated' && canHaveOwnNetwork;
  for (const { argument, what, isOfNetwork } of resources) {
    if (isOfNetwork && hasOwnNetwork) continue;
    yield {
      code: 'HOST_RESOURCE',
      reason: `only one VM of a host can have ${what}, which ${name} takes by "${argument}"`,
      remedy: [
        'start the VM without this argument',
        ...(isOfNetwork ? ['let the system choose the port'] : []),
        ...(isOfNetwork && canHaveOwnNetwork ? ['use --network isolated'] : []),
      ].join(', or '),
    };
  }
}

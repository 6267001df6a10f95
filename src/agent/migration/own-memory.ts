import type { VmSpec } from '../../domain/vm.js';

/** Gives an incoming clone memory of its own: all its pages are transferred, and the image stays on the source. */
export function withOwnMemory(spec: VmSpec): VmSpec {
  return spec.memory.backing === 'image' ? { ...spec, memory: { ...spec.memory, backing: 'shared' } } : spec;
}

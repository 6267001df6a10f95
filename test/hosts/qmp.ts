/** QEMU itself, where a test looks at what VmProcess has no word for, or does by hand what sessions do. */
import type { ManagedVm } from '../../src/agent/vm/vms.js';
import { QemuProcess } from '../../src/backends/qemu/process.js';
import type { QmpClient } from '../../src/backends/qemu/qmp/client.js';

/** Throws QEMU_GONE while there is no connection. */
export function qmpOf(vm: ManagedVm): QmpClient {
  if (vm.process instanceof QemuProcess) return vm.process.qmp;
  throw new TypeError(`${vm.spec.name} is not run by QEMU`);
}

/** Whom QEMU runs as in tests: as by default, or as VMIGRATE_TEST_QEMU_USER says (`root`, or the first uid). */
import type { QemuUsers } from '../../src/agent/contain/processes.js';
import { placeIn } from '../../src/agent/vm/vm.js';
import { QEMU_USERS_DEFAULT } from '../../src/config.js';

const asked = process.env['VMIGRATE_TEST_QEMU_USER'];
const wanted: QemuUsers = asked === undefined ? QEMU_USERS_DEFAULT : { from: Number(asked), count: 4096 };

/** As VmManager takes it. */
export const QEMU_USERS: QemuUsers | null = asked === 'root' ? null : wanted;
/** As the configuration takes it. */
export const QEMU_USER_CONFIG = QEMU_USERS ?? 'root';

/** Where the QEMU of a VM has its sockets. `directory` is the VM's own. */
export function socketDirectoryIn(directory: string): string {
  return placeIn(directory, '', QEMU_USERS !== null).socketDirectory;
}

/**
 * Whom QEMU runs as in tests with real daemons or a real agent: VMIGRATE_TEST_QEMU_USER is `root`, or the first uid of
 * those for VMs.
 */

import type { QemuUsers } from '../../src/agent/contain/users.js';
import { placeIn } from '../../src/agent/vm/vm.js';

const asked = process.env['VMIGRATE_TEST_QEMU_USER'] ?? 'root';

/** As VmManager takes it. */
export const QEMU_USERS: QemuUsers | null = asked === 'root' ? null : { from: Number(asked), count: 4096 };
/** As the configuration takes it. */
export const QEMU_USER_CONFIG = QEMU_USERS ?? 'root';

/** Where the QEMU of a VM has its sockets. `directory` is the VM's own. */
export function socketDirectoryIn(directory: string): string {
  return placeIn(directory, '', QEMU_USERS !== null).socketDirectory;
}

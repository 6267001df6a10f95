/** Whether a guest finds anything to boot from. Pure, and only for a warning: in doubt there is something. */
import type { VmSpec } from '../../domain/vm.js';
import { argumentsIn, optionsIn } from './options.js';

/** Options that bring a kernel, a firmware with a boot menu of its own, a drive, or a boot over the network. */
const OPTIONS =
  /^(kernel|bios|cdrom|hd[a-d]|fd[ab]|pflash|mtdblock|sd|drive|blockdev|boot|option-rom|nic|net|readconfig)$/;
/** Devices that a firmware can boot from without a drive of the command line. NICs boot over the network. */
const DEVICES = /net-|net$|e1000|rtl8139|pcnet|vmxnet|loader|vfio|vhost-user-(blk|scsi)/;

type Arguments = Pick<VmSpec, 'kernel' | 'disks' | 'devices' | 'qemuArgs'>;

/** The NICs of a spec have no boot ROM. */
export function hasBootSource({ kernel, disks, devices, qemuArgs }: Arguments): boolean {
  if (kernel !== undefined || disks.length > 0) return true;
  const all = [...argumentsIn(qemuArgs), ...devices.map((value) => ({ option: 'device', value }))];
  return all.some(({ option, value }) => (option === 'device' ? isBootDevice(value) : OPTIONS.test(option)));
}

function isBootDevice(value: string): boolean {
  const { head, keys } = optionsIn(value);
  const driver = head === '' ? (keys.get('driver') ?? '') : head;
  return keys.has('drive') || keys.has('romfile') || DEVICES.test(driver);
}

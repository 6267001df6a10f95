import { expect, test } from 'vitest';
import { devicesIn } from '../../../../src/backends/qemu/facts.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const specWith = (devices: readonly string[], qemuArgs: readonly string[] = []) =>
  parseSpec({ name: 'a', memory: { size: '64M' }, devices, qemuArgs });

test('what the devices of a spec mean for a move or a fork', () => {
  expect(devicesIn(specWith(['virtio-rng-pci', 'usb-tablet']))).toEqual({
    withoutState: [],
    escaping: [],
    discarding: [],
    hostResources: [],
    hasBootSource: false,
  });
  const devices = ['nvme,serial=1', 'nvme-ns', 'virtio-gpu-gl-pci', 'vfio-pci,host=01:00.0', 'virtio-balloon-pci,id=b'];
  expect(devicesIn(specWith(devices, ['-device', 'ivshmem-plain,memdev=m', '-device', 'virtio-mem-pci,id=m']))).toEqual(
    {
      withoutState: ['nvme', 'nvme-ns', 'virtio-gpu-gl-pci'],
      escaping: ['vfio-pci', 'ivshmem-plain,memdev=m'],
      discarding: ['virtio-balloon-pci', 'virtio-mem-pci'],
      hostResources: [],
      // A passed-through disk or NIC may boot.
      hasBootSource: true,
    },
  );
});

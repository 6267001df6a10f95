import { describe, expect, test } from 'vitest';
import {
  allowsPath,
  forbiddenIn,
  type HostPolicy,
  NOTHING_ALLOWED,
  refuseForbidden,
} from '../../../src/domain/policy.js';
import { parseSpec } from '../../../src/schemas/vm-spec.js';

const policy = (change: Partial<HostPolicy>): HostPolicy => ({ ...NOTHING_ALLOWED, ...change });
const spec = (change: object) => parseSpec({ name: 'web', memory: { size: '64M' }, ...change });

describe('by default', () => {
  test('a VM that names nothing of the host is allowed', () => {
    expect(forbiddenIn(spec({}), NOTHING_ALLOWED)).toEqual([]);
  });

  test('everything that reaches beyond the VM is forbidden, each with the key that would allow it', () => {
    const found = forbiddenIn(
      spec({
        ...{
          kernel: '/boot/vmlinuz',
          initrd: '/boot/initrd',
          disks: [{ path: '/dev/sda' }],
          nics: [{ bridge: 'br0' }],
        },
        ...{ devices: ['vfio-pci,host=01:00.0'], qemuArgs: ['-chardev', 'file,id=x,path=/etc/cron.d/x'] },
      }),
      NOTHING_ALLOWED,
    );
    expect(found.map(({ what, key }) => `${what}: ${key}`)).toEqual([
      ...['kernel: paths', 'initrd: paths', 'disk disk0: paths', 'nic net0: bridges', 'devices: devices'],
      ...['qemuArgs: qemuArgs', 'qemuArgs: qemuArgs'],
    ]);
    expect(() => refuseForbidden(found, 'user/alice', 'A')).toThrow(
      expect.objectContaining({
        code: 'NOT_PERMITTED',
        remedy: expect.stringMatching(/security\.allow\.paths and .*\.bridges and .*\.devices and .*\.qemuArgs/),
      }),
    );
  });
});

test('an initial ramdisk is one file, not a list', () => {
  const images = policy({ paths: ['/srv/images'] });
  expect(forbiddenIn(spec({ kernel: '/srv/images/k', initrd: '/srv/images/a' }), images)).toEqual([]);
  expect(forbiddenIn(spec({ kernel: '/srv/images/k', initrd: '/srv/images/a,/etc/shadow' }), images)).toHaveLength(1);
});

describe('an allowed directory', () => {
  const images = policy({ paths: ['/srv/images'] });

  test.each(['/srv/images/a.qcow2', '/srv/images/team/a.raw'])('allows %s', (path) => {
    expect(allowsPath(images, path)).toBe(true);
  });

  test.each([
    ...['/srv/images', '/srv/images-of-others/a', '/srv/images/../shadow', '/etc/shadow', 'srv/images/a', '', '/'],
    ...['//srv/images/a', '/srv/./images/a'],
  ])('does not allow %j', (path) => {
    expect(allowsPath(images, path)).toBe(false);
  });

  test('may be all of them', () => {
    expect(allowsPath(policy({ paths: ['*'] }), '/etc/shadow')).toBe(true);
    expect(allowsPath(policy({ paths: ['/'] }), '/etc/shadow')).toBe(true);
  });
});

describe('a device', () => {
  const keys = (devices: string[], allowed: string[]) => forbiddenIn(spec({ devices }), policy({ devices: allowed }));

  test('is allowed as it is written, because its properties may name files', () => {
    expect(keys(['virtio-rng-pci'], ['virtio-rng-pci'])).toEqual([]);
    expect(keys(['virtio-rng-pci,romfile=/etc/shadow'], ['virtio-rng-pci'])).toHaveLength(1);
    expect(keys(['virtio-rng-pci,bus=pci.0'], ['virtio-rng-pci,*'])).toEqual([]);
    expect(keys(['virtio-rng-pci-x'], ['virtio-rng-pci,*'])).toHaveLength(1);
    // QEMU takes the last driver that is named, and JSON.
    expect(keys(['virtio-rng-pci,driver=vfio-pci,host=01:00.0'], ['virtio-rng-pci,*'])).toHaveLength(1);
    expect(keys(['{"driver":"vfio-pci"}'], ['virtio-rng-pci,*', '{"driver":"vfio-pci"},*'])).toHaveLength(1);
    expect(keys(['vfio-pci,host=1:0.0'], ['*'])).toEqual([]);
  });
});

test('arguments and bridges are allowed one by one', () => {
  const allowed = policy({ qemuArgs: ['-rtc', 'base=utc'], bridges: ['br0'] });
  expect(forbiddenIn(spec({ qemuArgs: ['-rtc', 'base=utc'], nics: [{ bridge: 'br0' }] }), allowed)).toEqual([]);
  expect(forbiddenIn(spec({ qemuArgs: ['-rtc', 'base=utc,x'] }), allowed)).toHaveLength(1);
  expect(forbiddenIn(spec({ nics: [{ bridge: 'br1' }] }), allowed)).toHaveLength(1);
});

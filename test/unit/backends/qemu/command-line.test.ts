import { describe, expect, test } from 'vitest';
import {
  nicProperties,
  type QemuPlacement,
  qemuArguments,
  qmpSocketArgument,
} from '../../../../src/backends/qemu/command-line.js';
import { CLONE_FILE_BYTES, cloneFileText, escapeOption } from '../../../../src/backends/qemu/identity-devices.js';
import type { VmSpec } from '../../../../src/domain/vm.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const MINIMAL = { name: 'a', memory: { size: '64M' } };
const UUID = '11111111-2222-3333-4444-555555555555';

function place(change: Partial<QemuPlacement> = {}): QemuPlacement {
  return {
    accel: 'tcg',
    qmpPath: '/s/qmp.sock',
    monitorPath: '/s/monitor.sock',
    serialPath: '/s/serial.sock',
    serialLogPath: '/s/serial.log',
    agentPath: '/s/agent.sock',
    ramPaths: ['/dev/shm/a/ram0.ram'],
    taps: {},
    isIncoming: false,
    ...change,
  };
}

function values(args: readonly string[], option: string): string[] {
  return args.flatMap((argument, index) => (args[index - 1] === option ? [argument] : []));
}

test('one region becomes the memory of the machine', () => {
  const args = qemuArguments(parseSpec({ name: 'a', machine: 'pc-q35-7.2', memory: { size: '64M' } }), place());
  expect(values(args, '-object')).toEqual([
    'memory-backend-file,id=ram0,size=67108864,share=on,mem-path=/dev/shm/a/ram0.ram',
  ]);
  expect(values(args, '-machine')).toEqual(['pc-q35-7.2,memory-backend=ram0']);
  expect(values(args, '-m')).toEqual(['size=67108864B']);
  expect(args).toContain('-S');
  expect(args).not.toContain('-incoming');
});

test('several regions become NUMA nodes', () => {
  const spec = parseSpec({ name: 'a', memory: { regions: [{ size: '64M' }, { size: '32M' }] } });
  const args = qemuArguments(spec, place({ ramPaths: ['/r0', '/r1'] }));
  expect(values(args, '-numa')).toEqual(['node,nodeid=0,memdev=ram0', 'node,nodeid=1,memdev=ram1']);
  expect(values(args, '-machine')).toEqual(['q35']);
  expect(values(args, '-m')).toEqual(['size=100663296B']);
});

test('private memory is anonymous, with huge pages a memfd', () => {
  const small = parseSpec({ name: 'a', memory: { size: '64M', backing: 'private' } });
  expect(values(qemuArguments(small, place({ ramPaths: [] })), '-object')).toEqual([
    'memory-backend-ram,id=ram0,size=67108864',
  ]);
  const huge = parseSpec({ name: 'a', memory: { size: '64M', backing: 'private', pageSize: '2M' } });
  expect(values(qemuArguments(huge, place({ ramPaths: [] })), '-object')[0]).toContain('hugetlbsize=2M');
});

test('the files of an image are shared only where the preload sees to it that they are not written', () => {
  const spec = parseSpec({ name: 'a', memory: { size: '64M' } });
  const clone = { ...spec, memory: { ...spec.memory, backing: 'image' as const } };
  const object = (vm: VmSpec) => values(qemuArguments(vm, place({ ramPaths: ['/i/ram0.ram'] })), '-object')[0];
  expect(object(clone)).toContain('share=on,mem-path=/i/ram0.ram');
  expect(object({ ...clone, hasPreload: false })).toContain('share=off,mem-path=/i/ram0.ram');
});

test('incoming waits for the address, and never starts by itself', () => {
  const args = qemuArguments(parseSpec({ name: 'a', memory: { size: '64M' } }), place({ isIncoming: true }));
  expect(values(args, '-incoming')).toEqual(['defer']);
  expect(args).toContain('-S');
});

test('the sandbox is on and no program is started for a tap', () => {
  const spec = parseSpec({ name: 'a', memory: { size: '64M' }, nics: [{ bridge: 'br0' }] });
  const args = qemuArguments(spec, place({ taps: { net0: 'vmgabc' } }));
  expect(values(args, '-sandbox')[0]).toBe('on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny');
  expect(values(args, '-netdev')).toEqual(['tap,id=host-net0,ifname=vmgabc,script=no,downscript=no']);
  expect(() => qemuArguments(spec, place())).toThrow(RangeError);
});

describe('the guest sees the same devices on every host', () => {
  const spec = parseSpec({
    name: 'a',
    uuid: UUID,
    memory: { size: '64M' },
    nics: [{ bridge: 'br0' }, {}],
    disks: [{ path: '/d1.qcow2' }, { path: '/d2', readOnly: true }],
    devices: ['virtio-rng-pci,id=rng'],
    guestAgent: true,
  });

  test('only what the host decides differs', () => {
    const here = qemuArguments(spec, place({ taps: { net0: 'vmgaaa' } }));
    const there = qemuArguments(spec, {
      accel: 'kvm',
      qmpPath: '/t/qmp.sock',
      monitorPath: '/t/monitor.sock',
      serialPath: '/t/serial.sock',
      serialLogPath: '/t/serial.log',
      agentPath: '/t/agent.sock',
      ramPaths: ['/dev/shm/b/ram0.ram'],
      taps: { net0: 'vmgbbb' },
      isIncoming: false,
    });
    const differing = here.flatMap((argument, index) => (argument === there[index] ? [] : [here[index - 1]]));
    const paths = Array.from({ length: 4 }, () => '-chardev');
    expect(differing).toEqual(['-accel', '-object', ...paths, '-netdev']);
    expect(there).toHaveLength(here.length);
  });

  const addresses = (of: VmSpec) =>
    values(qemuArguments(of, place({ taps: { net0: 'vmgaaa' } })), '-device').flatMap((device) => {
      const [driver, address] = [/^[^,]+/.exec(device)?.[0] ?? '', /addr=(\w+)/.exec(device)?.[1]];
      return address === undefined ? [] : [`${driver} ${address}`];
    });

  test('addresses do not depend on other devices', () => {
    expect(addresses(spec)).toEqual([
      'virtio-serial-pci 0x1b',
      'pcie-root-port 0x02',
      'virtio-net-pci 0x00',
      'pcie-root-port 0x03',
      'virtio-net-pci 0x00',
      'virtio-blk-pci 0x0a',
      'virtio-blk-pci 0x0b',
    ]);
    expect(addresses({ ...spec, nics: [] })).toEqual([
      'virtio-serial-pci 0x1b',
      'virtio-blk-pci 0x0a',
      'virtio-blk-pci 0x0b',
    ]);
    expect(addresses({ ...spec, machine: 'pc-i440fx-7.2' })).toContain('virtio-net-pci 0x02');
  });

  test('and those of a VM that is older than its identity devices', () => {
    const { vmGenerationId: _, ...old } = spec;
    expect(addresses(old)).toEqual([
      'virtio-net-pci 0x02',
      'virtio-net-pci 0x03',
      'virtio-blk-pci 0x0a',
      'virtio-blk-pci 0x0b',
    ]);
    expect(values(qemuArguments(old, place({ taps: { net0: 'vmgaaa' } })), '-fw_cfg')).toEqual([]);
  });

  test('a NIC that is plugged in later has the address of the one that was unplugged', () => {
    const [nic] = spec.nics;
    if (nic === undefined) throw new Error('no NIC');
    expect(nicProperties(spec, { ...nic, mac: '56:00:00:00:00:01' }, 0)).toEqual({
      driver: 'virtio-net-pci',
      id: 'net0',
      mac: '56:00:00:00:00:01',
      bus: 'port-net0',
      addr: '0x00',
      romfile: '',
      netdev: 'host-net0',
    });
  });
});

describe('who the guest is', () => {
  const spec = parseSpec({ name: 'a', memory: { size: '64M' }, kernel: '/k', initrd: '/i', append: 'x' });
  const clone = { ...spec, name: 'n'.repeat(63), clone: { fork: '0123456789abcdef', index: 1022, cloneCount: 1023 } };

  test('is in a file of constant length, for parent and clone', () => {
    expect(cloneFileText(spec)).toHaveLength(CLONE_FILE_BYTES);
    expect(cloneFileText(clone)).toHaveLength(CLONE_FILE_BYTES);
    expect(JSON.parse(cloneFileText(spec))).toMatchObject({ index: null, count: null, name: 'a', fork: null });
    expect(JSON.parse(cloneFileText(clone))).toMatchObject({ index: 1022, count: 1023, fork: '0123456789abcdef' });
    const [file] = values(qemuArguments(clone, place()), '-fw_cfg');
    expect(file?.replaceAll(',,', ',')).toBe(`name=opt/vmigrate/clone,string=${cloneFileText(clone)}`);
  });

  test('is what vmgenid says, where there is ACPI', () => {
    const generation = `vmgenid,id=vmg-generation,guid=${spec.vmGenerationId}`;
    expect(values(qemuArguments(spec, place()), '-device')).toContain(generation);
    const micro = values(qemuArguments({ ...spec, machine: 'microvm' }, place()), '-device');
    expect(micro).toEqual([
      'virtio-serial-device,id=vmg-serial,max_ports=4',
      'virtserialport,id=vmg-exit,bus=vmg-serial.0,nr=1,chardev=chr-exit,name=org.vmigrate.exit',
    ]);
    expect(values(qemuArguments({ ...spec, machine: 'isapc' }, place()), '-device')).toEqual([]);
    expect(() => parseSpec({ ...MINIMAL, devices: ['vmgenid,guid=auto'] })).toThrow(/vmgenid/);
  });

  test('a clone has the ROM of its parent, and neither kernel nor initrd', () => {
    const args = qemuArguments(clone, place());
    expect(args).not.toContain('-kernel');
    expect(args).not.toContain('/i');
    expect(values(args, '-option-rom')).toEqual(['linuxboot_dma.bin,bootindex=0']);
    const { kernel: _, initrd: __, append: ___, ...diskVm } = clone;
    expect(qemuArguments(diskVm, place())).not.toContain('-option-rom');
  });
});

test('commas in values stay values', () => {
  expect(escapeOption('a,b,,c')).toBe('a,,b,,,,c');
  const spec = parseSpec({
    name: 'a',
    memory: { size: '64M' },
    kernel: '/k,share=off',
    append: 'x=1,2',
    disks: [{ path: '/d,read-only=on' }],
  });
  const args = qemuArguments(spec, place({ ramPaths: ['/r,share=off'], qmpPath: '/q,path=/x' }));
  expect(values(args, '-object')[0]).toContain('mem-path=/r,,share=off');
  expect(values(args, '-blockdev')[0]).toContain('filename=/d,,read-only=on');
  expect(values(args, '-chardev')[0]).toContain('path=/q,,path=/x');
  // The value is not an option list, so it is passed unchanged.
  expect(values(args, '-kernel')).toEqual(['/k,share=off']);
  expect(values(args, '-append')).toEqual(['x=1,2']);
});

test('a QEMU is known by its QMP socket, whatever else it was started with', () => {
  for (const qmpPath of ['/s/qmp.sock', '/s/a,b/qmp.sock']) {
    const args = qemuArguments(parseSpec({ ...MINIMAL, serial: true }), place({ qmpPath, isIncoming: true }));
    expect(args.filter((argument) => argument === qmpSocketArgument(qmpPath))).toHaveLength(1);
  }
});

import { describe, expect, test } from 'vitest';
import { parseSpec } from '../../src/agent/spec.js';
import { escapeOption, type QemuPlacement, qemuArguments } from '../../src/qemu/command.js';

const UUID = '11111111-2222-3333-4444-555555555555';

function place(change: Partial<QemuPlacement> = {}): QemuPlacement {
  return {
    accel: 'tcg',
    qmpPath: '/s/qmp.sock',
    monitorPath: '/s/monitor.sock',
    serialPath: '/s/serial.sock',
    serialLogPath: '/s/serial.log',
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
  });

  test('only what the host decides differs', () => {
    const here = qemuArguments(spec, place({ taps: { net0: 'vmgaaa' } }));
    const there = qemuArguments(spec, {
      accel: 'kvm',
      qmpPath: '/t/qmp.sock',
      monitorPath: '/t/monitor.sock',
      serialPath: '/t/serial.sock',
      serialLogPath: '/t/serial.log',
      ramPaths: ['/dev/shm/b/ram0.ram'],
      taps: { net0: 'vmgbbb' },
      isIncoming: false,
    });
    const differing = here.flatMap((argument, index) => (argument === there[index] ? [] : [here[index - 1]]));
    expect(differing).toEqual(['-accel', '-object', '-chardev', '-chardev', '-chardev', '-netdev']);
    expect(there).toHaveLength(here.length);
  });

  test('addresses do not depend on other devices', () => {
    const devices = values(qemuArguments(spec, place({ taps: { net0: 'vmgaaa' } })), '-device');
    expect(devices.map((device) => /addr=(\w+)/.exec(device)?.[1])).toEqual([
      '0x02',
      '0x03',
      '0x0a',
      '0x0b',
      undefined,
    ]);
    const alone = qemuArguments({ ...spec, nics: [] }, place());
    expect(values(alone, '-device')[0]).toContain('addr=0x0a');
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
  // Not an option list: taken as it is.
  expect(values(args, '-kernel')).toEqual(['/k,share=off']);
  expect(values(args, '-append')).toEqual(['x=1,2']);
});

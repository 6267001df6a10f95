import { describe, expect, test } from 'vitest';
import { argumentFiles } from '../../../../src/backends/qemu/argument-files.js';
import { deviceChanges } from '../../../../src/backends/qemu/device-changes.js';
import { hasBootSource } from '../../../../src/backends/qemu/facts.js';
import { hostResources } from '../../../../src/backends/qemu/host-arguments.js';
import { argumentsIn, optionsIn } from '../../../../src/backends/qemu/options.js';

describe('options', () => {
  test('are split at commas that stand alone, and JSON is flattened', () => {
    const { head, keys } = optionsIn('socket,id=a,path=/x,,y,server,nowait,delay=off');
    expect(head).toBe('socket');
    expect([...keys]).toEqual([
      ['id', 'a'],
      ['path', '/x,y'],
      ['server', 'on'],
      ['wait', 'off'],
      ['delay', 'off'],
    ]);
    const json = '{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"/d"}}';
    expect([...optionsIn(json).keys]).toEqual([
      ['driver', 'qcow2'],
      ['read-only', 'on'],
      ['file.driver', 'file'],
      ['file.filename', '/d'],
    ]);
    expect(optionsIn('{"driver":').head).toBe('{"driver":');
  });

  test('an argument belongs to the option before it', () => {
    expect(argumentsIn(['-s', '--drive', 'file=/a', '-vnc', ':1', 'stray'])).toEqual([
      { option: 's', value: '', text: '-s' },
      { option: 'drive', value: 'file=/a', text: '--drive file=/a' },
      { option: 'vnc', value: ':1', text: '-vnc :1' },
      { option: '', value: 'stray', text: 'stray' },
    ]);
  });
});

const FILES: readonly [args: readonly string[], files: readonly (readonly [path: string, isWritable: boolean])[]][] = [
  [['-drive', 'if=pflash,format=raw,readonly=on,file=/fw/CODE.fd'], [['/fw/CODE.fd', false]]],
  [['-drive', 'if=pflash,format=raw,file=/fw/VARS.fd'], [['/fw/VARS.fd', true]]],
  [['-drive', 'file=/iso/a.iso,media=cdrom'], [['/iso/a.iso', false]]],
  [['-drive', '/plain.img,format=raw'], [['/plain.img', true]]],
  [['-drive', 'file=/a,,b.img'], [['/a,b.img', true]]],
  [['-drive', 'file.driver=file,file.filename=/n.img,read-only=on'], [['/n.img', false]]],
  [['-drive', 'file=/s.img,snapshot=on'], [['/s.img', false]]],
  [['-blockdev', 'driver=file,filename=/b.img,node-name=n'], [['/b.img', true]]],
  [
    [
      '-blockdev',
      '{"driver":"qcow2","file":{"driver":"file","filename":"/t"},"backing":{"file":{"filename":"/base"}}}',
    ],
    [
      ['/t', true],
      ['/base', false],
    ],
  ],
  [
    ['-cdrom', '/iso/b.iso', '-hda', 'relative.img'],
    [
      ['/iso/b.iso', false],
      ['relative.img', true],
    ],
  ],
  [['-pflash', 'file:/fw/flash'], [['/fw/flash', true]]],
  [['-fw_cfg', 'name=opt/x,file=/etc/x.json'], [['/etc/x.json', false]]],
  [['-fw_cfg', 'name=opt/x,string=/not/a/file'], []],
  [['-bios', '/fw/seabios.bin', '-bios', 'bios-256k.bin'], [['/fw/seabios.bin', false]]],
  [
    ['-acpitable', 'sig=X,data=/a.aml:/b.aml'],
    [
      ['/a.aml', false],
      ['/b.aml', false],
    ],
  ],
  [['-smbios', 'file=/smbios.bin'], [['/smbios.bin', false]]],
  [['-object', 'secret,id=s,file=/key'], [['/key', false]]],
  [['-device', 'loader,file=/blob'], [['/blob', false]]],
  [['-drive', 'file=rbd:pool/image', '-drive', 'file=nbd://10.0.0.1/x', '-drive', 'file=json:{}'], []],
  [['-chardev', 'file,id=c,path=/log', '-vnc', ':1', '-s'], []],
];

test.each(FILES)('the files of %j', (qemuArgs, files) => {
  const found = argumentFiles({ devices: [], qemuArgs });
  expect(found.map(({ path, isWritable }) => [path, isWritable])).toEqual(files);
});

test('devices of a spec name files, too', () => {
  expect(
    argumentFiles({ devices: ['e1000,romfile=/rom', 'e1000,romfile=', 'e1000,romfile=pxe.rom'], qemuArgs: [] }),
  ).toMatchObject([{ path: '/rom', use: '-device', isWritable: false }]);
});

const HOST: readonly [args: readonly string[], found: readonly RegExp[]][] = [
  [
    ['-netdev', 'user,id=u0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53'],
    [/port tcp:127.*2222/, /udp::53/],
  ],
  [['-netdev', 'user,id=u0,hostfwd=tcp::0-:22'], []],
  [['-nic', 'user,hostfwd=tcp::2222-:22'], [/2222/]],
  [['-netdev', 'user,id=u0'], []],
  [['-netdev', 'socket,id=s,listen=:1234'], [/:1234/]],
  [['-netdev', 'tap,id=t,ifname=tap7'], [/tap7/]],
  [['-vnc', '127.0.0.1:7'], [/display 127.0.0.1:7/]],
  [['-vnc', ':7,to=99'], []],
  [['-vnc', 'none'], []],
  [['-vnc', 'unix:/run/v.sock'], [/socket \/run\/v\.sock/]],
  [['-display', 'vnc=:3'], [/display :3/]],
  [['-spice', 'port=5900,disable-ticketing=on'], [/5900/]],
  [['-chardev', 'socket,id=c,path=/run/c,server=on,wait=off'], [/socket \/run\/c/]],
  [['-chardev', 'socket,id=c,path=/run/c,server,nowait'], [/socket \/run\/c/]],
  [['-chardev', 'socket,id=c,path=/run/c'], []],
  [['-chardev', 'socket,id=c,host=::1,port=4444,server=on'], [/port 4444/]],
  [['-chardev', 'file,id=c,path=/var/log/x'], [/file \/var\/log\/x/]],
  [['-chardev', 'null,id=c,logfile=/var/log/y'], [/file \/var\/log\/y/]],
  [['-chardev', 'udp,id=c,host=a,port=1,localport=7'], [/UDP port 7/]],
  [
    ['-qmp', 'unix:/run/q,server=on,wait=off', '-monitor', 'tcp:127.0.0.1:5555,server,nowait'],
    [/\/run\/q/, /5555/],
  ],
  [['-gdb', 'tcp::1234,server=on'], [/1234/]],
  [['-s'], [/1234/]],
  [['-debugcon', 'file:/tmp/d'], [/file \/tmp\/d/]],
  [['-device', 'vhost-vsock-pci,guest-cid=3'], [/CID 3/]],
  [['-device', 'virtio-rng-pci', '-drive', 'file=/x'], []],
];

test.each(HOST)('what only one VM of a host can have of %j', (qemuArgs, found) => {
  const resources = hostResources({ devices: [], qemuArgs });
  expect(resources).toHaveLength(found.length);
  for (const [index, pattern] of found.entries()) expect(resources[index]?.what).toMatch(pattern);
});

test('ports belong to a network namespace, paths do not', () => {
  const args = ['-vnc', ':1', '-vnc', 'unix:/v', '-chardev', 'socket,id=a,port=1,server=on'];
  expect(
    hostResources({ devices: [], qemuArgs: args }).map(({ argument, isOfNetwork }) => [argument, isOfNetwork]),
  ).toEqual([
    ['-vnc :1', true],
    ['-vnc unix:/v', false],
    ['-chardev socket,id=a,port=1,server=on', true],
  ]);
});

test('a drive is told from what QEMU reads at its start, with the format that it is given', () => {
  const qemuArgs = ['-cdrom', '/a', '-drive', 'file=/b,format=qcow2,readonly=on', '-bios', '/c', '-fw_cfg', 'file=/d'];
  expect(
    argumentFiles({ devices: ['x,romfile=/e'], qemuArgs }).map(({ path, isDrive, format }) => [path, isDrive, format]),
  ).toEqual([
    ['/a', true, null],
    ['/b', true, 'qcow2'],
    ['/c', false, null],
    ['/d', false, null],
    ['/e', false, null],
  ]);
});

const BOOTS: readonly [what: string, spec: Partial<Parameters<typeof hasBootSource>[0]>, boots: boolean][] = [
  ['nothing', {}, false],
  ['a kernel', { kernel: '/k' }, true],
  ['a disk', { disks: [{ id: 'd', path: '/d', format: 'raw', isReadOnly: false }] }, true],
  ['devices that nothing boots from', { devices: ['virtio-rng-pci'], qemuArgs: ['-vnc', 'none'] }, false],
  ['a CD', { qemuArgs: ['-cdrom', '/a.iso'] }, true],
  ['a NIC with a boot ROM', { devices: ['virtio-net-pci,netdev=n'] }, true],
  ['a drive of its own', { qemuArgs: ['-device', '{"driver":"ide-hd","drive":"x"}'] }, true],
  ['a firmware', { qemuArgs: ['-bios', '/fw/OVMF.fd'] }, true],
];

test.each(BOOTS)('a guest with %s boots or not', (_, spec, boots) => {
  expect(hasBootSource({ disks: [], devices: [], qemuArgs: [], ...spec })).toBe(boots);
});

describe('devices behind the daemon’s back', () => {
  const line = [
    '-nodefaults',
    '-device',
    'virtio-serial-pci,id=s',
    '-device',
    '{"driver":"e1000","id":"n"}',
    '-device',
    'VGA',
  ];
  const present = [
    { id: 's', type: 'virtio-serial-pci' },
    { id: 'n', type: 'e1000' },
    { id: null, type: 'VGA' },
  ];

  test('none', () => {
    expect(deviceChanges(line, present)).toEqual([]);
    // A driver's other name.
    expect(deviceChanges(['-device', 'virtio-net'], [{ id: null, type: 'virtio-net-pci' }])).toEqual([]);
  });

  test('are named', () => {
    expect(deviceChanges(line, [...present, { id: 'p', type: 'virtserialport' }])).toEqual([
      'device p (virtserialport) was added while the VM ran',
    ]);
    expect(deviceChanges(line, present.slice(1))).toEqual([
      'device s (virtio-serial-pci) was removed while the VM ran',
    ]);
    expect(deviceChanges(line, [...present, { id: null, type: 'usb-tablet' }])).toEqual([
      'a device without an id (usb-tablet) was added while the VM ran',
    ]);
    expect(deviceChanges(line, present.slice(0, 2))).toEqual([
      'a device without an id (VGA) was removed while the VM ran',
    ]);
  });

  test('without an id are not counted where other options make devices', () => {
    const more = [...present, { id: null, type: 'virtio-blk-pci' }];
    expect(deviceChanges([...line, '-drive', 'if=virtio,file=/a'], more)).toEqual([]);
  });
});

/**
 * A guest that has broken out: its QEMU is a program that tries what it may not, with all rights that a contained QEMU
 * has, and then becomes QEMU. What it finds stands in the VM's log.
 */
import { chmod, mkdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { VmView } from '../../../src/domain/vm.js';
import { connectUnix } from '../../../src/kit/unix-socket.js';
import { Cluster } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';

const FROM = 64_055;
/** Prints NAME=what the command says, in one line. `--version` is asked by the daemon itself, as root. */
const script = (directory: string) => `#!/bin/bash
if [ "$1" != --version ] && [[ " $* " == *" guest=attacker,"* ]]; then
  try() { local name=$1; shift; echo "TRY $name=$("$@" 2>&1 | tr '\\n' ' ')"; }
  try user id -u
  try groups id -G
  try rights grep -E '^(CapEff|CapBnd|CapInh|NoNewPrivs)' /proc/self/status
  try root ls /
  try secret cat ${directory}/secret
  try secretDisk cat ${directory}/other.raw
  try shadow cat /etc/shadow
  try key cat ${directory}/A/tls/key.pem
  try records ls ${directory}/A/state ${directory}/A/state/vms ${directory}/A/state/vms/attacker
  try victimMemory ls ${directory}/ram
  try victim cat /proc/$(cat ${directory}/shown/pid)/cmdline
  try signal kill -0 $(cat ${directory}/shown/pid)
  try api bash -c 'exec 5<>/dev/tcp/127.0.0.1/9; ls -d ${directory}/A/api.sock'
  try write touch /usr/x /x ${directory}/x
  try device bash -c 'mknod /tmp/sda b 8 0; ls /dev'
  try own head -c 4 ${directory}/own.raw
  try ownWritable bash -c 'exec 5<>${directory}/base.raw'
  try kmsg head -c 1 /dev/kmsg
fi
exec qemu-system-x86_64 "$@"
`;

let cluster: Cluster;
let tried: ReadonlyMap<string, string>;
let victim: VmView;
const at = (...parts: string[]): string => join(cluster.directory, ...parts);

beforeAll(async () => {
  const program = `/tmp/vmg-attacker-${process.pid}`;
  cluster = await Cluster.create({
    hosts: ['A'],
    daemonConfig: { qemu: program, security: { qemuUser: { from: FROM, count: 8 }, allow: { paths: ['*'] } } },
  });
  await writeFile(program, script(cluster.directory), { mode: 0o755 });
  await writeFile(at('secret'), 'SECRET\n', { mode: 0o600 });
  for (const name of ['own', 'base', 'other']) await writeFile(at(`${name}.raw`), name.padEnd(4096), { mode: 0o600 });
  // Nothing but the container stands between the attacker and what everybody may read.
  await chmod(at(), 0o755);
  await mkdir(at('shown'));
  // The attacker is a script, whose shell would use up the preload.
  const usual = { touchMiB: 8, memoryMiB: 128, restPercent: 90, hasPreload: false };
  const guest = await Guest.start(cluster, 'A', { name: 'victim', ...usual });
  victim = (await guest.view('A')) as VmView;
  await writeFile(at('shown', 'pid'), String(victim.pid));
  await symlink(cluster.ramDirectory('A'), at('ram'));
  const disks = [
    { id: 'own', path: at('own.raw'), format: 'raw' },
    { id: 'base', path: at('base.raw'), format: 'raw', readOnly: true },
    { id: 'pid', path: at('shown', 'pid'), format: 'raw', readOnly: true },
  ];
  await Guest.start(cluster, 'A', { name: 'attacker', ...usual, extra: { disks } });
  const log = await readFile(join(cluster.hostDirectory('A'), 'state/vms/attacker/qemu.log'), 'utf8');
  tried = new Map([...log.matchAll(/^TRY (\w+)=(.*)$/gm)].map(([, name = '', said = '']) => [name, said.trim()]));
});
afterAll(async () => {
  await cluster?.destroy();
});

describe('a guest that has broken out of its QEMU', () => {
  it('is a user of its own, without rights', async () => {
    expect(Number(tried.get('user'))).toBeGreaterThanOrEqual(FROM);
    expect(tried.get('groups')).toBe(tried.get('user'));
    const { uid } = await statusOf(victim.pid ?? 0);
    expect(uid, 'the victim has another user').not.toBe(Number(tried.get('user')));
    expect(tried.get('rights')).toMatch(/CapInh:\s0+ CapEff:\s0+ CapBnd:\s0+ NoNewPrivs:\s1/);
  });

  it('sees nothing of the host but programs', () => {
    expect(tried.get('root')?.split(' ').sort()).toEqual(expect.arrayContaining(['dev', 'proc', 'usr']));
    expect(tried.get('root')).not.toMatch(/\b(home|root|srv|var|work|sys)\b/);
    for (const name of ['secret', 'shadow', 'key', 'victimMemory', 'api', 'kmsg'])
      expect(tried.get(name), name).toMatch(/No such file|Connection refused/);
    // Of the daemon's directory only what leads to its own sockets.
    expect(tried.get('records')?.replaceAll(cluster.directory, '')).toBe(
      '/A/state: vms  /A/state/vms: attacker  /A/state/vms/attacker: qemu',
    );
    for (const said of tried.values()) expect(said).not.toMatch(/SECRET|PRIVATE KEY|root:/);
  });

  it('opens no file that its VM does not name, and its own ones only as the VM does', () => {
    expect(tried.get('own')).toBe('own');
    expect(tried.get('secretDisk')).toMatch(/No such file/);
    expect(tried.get('ownWritable')).toMatch(/No such file|Permission denied|Read-only/);
  });

  it('neither sees other processes nor reaches them', () => {
    expect(tried.get('victim')).toMatch(/No such file/);
    expect(tried.get('signal')).toMatch(/Operation not permitted|No such process/);
  });

  it('changes nothing, and makes no device', () => {
    expect(tried.get('write')).toMatch(/Permission denied.*Permission denied.*(Permission denied|No such)/);
    expect(tried.get('device')).toMatch(/Read-only|No such file|not permitted/);
  });

  it('cannot lead the daemon to a socket of somebody else', async () => {
    const link = at('A/state/vms/attacker/qemu/planted.sock');
    await symlink(at('A/api.sock'), link);
    await expect(
      new Promise((resolve, reject) => connectUnix(link).once('connect', resolve).once('error', reject)),
    ).rejects.toMatchObject({ code: 'ENOTSOCK' });
  });

  it('leaves its VM a VM like others', async () => {
    const { pages, bad } = await new Guest(cluster, 'attacker').verify('A');
    expect({ pages, bad }).toEqual({ pages: 2048, bad: 0 });
  });
});

async function statusOf(pid: number): Promise<{ uid: number }> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return { uid: Number(/^Uid:\s+(\d+)/m.exec(status)?.[1]) };
}

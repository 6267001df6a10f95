import { execFile } from 'node:child_process';
import { access, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { hostFacts } from '../../src/agent/inventory/host-facts.js';
import { ramFacts } from '../../src/agent/inventory/vm-facts.js';
import { openConsole } from '../../src/agent/vm/console.js';
import { seal, unseal } from '../../src/durable/sealed.js';
import { guestImage } from '../hosts/guest.js';
import { qmpOf } from '../hosts/qmp.js';
import { codeOf, expectOutput, VmHost, vmSpec } from '../hosts/vm-host.js';

const run = promisify(execFile);

let host: VmHost;
beforeEach(async () => {
  host = await VmHost.start();
});
afterEach(async () => {
  expect(await host.close()).toEqual([]);
});

describe('a VM', () => {
  test('runs, pauses, resumes, stops, and is forgotten', async () => {
    const view = await host.vms.run(vmSpec({ cpus: 2 }));
    expect(view).toMatchObject({ name: 'vm', host: 'A', state: 'running', epoch: 1, accel: 'tcg', job: null });
    expect(view.machine).toMatch(/^pc-q35-\d/);
    expect(await host.registry.owner('vm')).toMatchObject({ vm: 'vm', owner: 'A', epoch: 1, session: null });
    expect(await qmpOf(host.vms.get('vm')).execute('query-status')).toMatchObject({ running: true });
    await host.vms.pause('vm');
    expect(host.vms.list()[0]?.state).toBe('paused');
    expect(await qmpOf(host.vms.get('vm')).execute('query-status')).toMatchObject({ running: false });
    await host.vms.resume('vm');
    expect(host.vms.list()[0]?.state).toBe('running');
    await host.vms.stop('vm', { isForced: false });
    expect(host.vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
    expect(host.vms.exitOf('vm')).toMatchObject({ reason: 'stopped', code: 0 });
    expect(await readdir(host.ramDir)).toEqual([]);
    expect(() => host.vms.get('vm').pid).toThrow(/ended/);
    await host.vms.stop('vm', { isForced: false });
    expect(host.vms.list()).toEqual([]);
    expect(await host.registry.owner('vm')).toBeNull();
  });

  test('whose QEMU someone else pauses is seen as paused', async () => {
    await host.vms.run(vmSpec());
    await qmpOf(host.vms.get('vm')).execute('stop');
    await expect.poll(() => host.vms.list()[0]?.state).toBe('paused');
  });

  test('outlives the daemon and is found again', async () => {
    const { pid } = await host.vms.run(vmSpec());
    await host.vms.pause('vm');
    await host.restart();
    expect(host.vms.list()[0]).toMatchObject({ state: 'paused', pid });
    await host.vms.resume('vm');
    const seen = host.exits();
    process.kill(host.vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length).toBe(1);
    expect(seen[0]).toMatchObject(['vm', { reason: 'killed' }]);
    expect(host.vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
  });

  test('whose QEMU is killed is stopped, and its memory is given back', async () => {
    await host.vms.run(vmSpec());
    const seen = host.exits();
    process.kill(host.vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length).toBe(1);
    expect(seen[0]).toMatchObject(['vm', { reason: 'killed', signal: 'SIGKILL' }]);
    await expect.poll(() => readdir(host.ramDir)).toEqual([]);
    expect(await codeOf(host.vms.pause('vm'))).toBe('CONFLICT');
  });

  test('that has ended does not run because somebody says so who has not heard of it', async () => {
    await host.vms.run(vmSpec());
    const seen = host.exits();
    process.kill(host.vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length).toBe(1);
    await host.vms.setState('vm', 'running');
    expect(host.vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
  });

  test('whose QEMU ends while no daemon runs is found stopped', async () => {
    const { pid } = await host.vms.run(vmSpec());
    await host.restart(async () => {
      process.kill(pid ?? 0, 'SIGKILL');
      await expect.poll(() => host.qemus()).toEqual([]);
    });
    expect(host.vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
    expect(host.vms.exitOf('vm')?.reason).toBe('vanished');
  });

  test('gives its name to a new one only when it has stopped', async () => {
    await host.vms.run(vmSpec());
    expect(await codeOf(host.vms.run(vmSpec()))).toBe('CONFLICT');
    expect(await codeOf(host.vms.prepareIncoming(vmSpec(), { session: 's', accel: 'tcg', epoch: 9 }))).toBe('CONFLICT');
    await host.vms.stop('vm', { isForced: true });
    expect((await host.vms.run(vmSpec())).state).toBe('running');
  });

  test('of one name is started once, however often it is asked for at the same time', async () => {
    const answers = await Promise.all([1, 2, 3].map(() => codeOf(host.vms.run(vmSpec()))));
    expect(answers.sort()).toEqual(['CONFLICT', 'CONFLICT', 'resolved']);
  });

  test('in a job is left alone by users', async () => {
    await host.vms.run(vmSpec());
    await host.vms.reserve('vm', 'job-1');
    await host.vms.reserve('vm', 'job-1');
    expect(await codeOf(host.vms.reserve('vm', 'job-2'))).toBe('VM_BUSY');
    for (const call of [host.vms.pause('vm'), host.vms.resume('vm'), host.vms.stop('vm', { isForced: false })]) {
      expect(await codeOf(call)).toBe('VM_BUSY');
    }
    await host.restart();
    expect(host.vms.get('vm').job).toBe('job-1');
    await host.vms.unreserve('vm', 'job-2');
    expect(host.vms.get('vm').job).toBe('job-1');
    await host.vms.unreserve('vm', 'job-1');
    await host.vms.pause('vm');
  });

  test('that belongs to another host is left alone, or ended by force, and stays that host’s', async () => {
    await host.vms.run(vmSpec());
    await host.registry.swapOwner('vm', 1, { vm: 'vm', owner: 'B', epoch: 2, session: null });
    expect(await codeOf(host.vms.resume('vm'))).toBe('OWNER_CHANGED');
    expect(await codeOf(host.vms.stop('vm', { isForced: false }))).toBe('OWNER_CHANGED');
    await host.vms.stop('vm', { isForced: true });
    expect(await host.registry.owner('vm')).toMatchObject({ owner: 'B' });
  });

  test('that takes the name of one that is being destroyed is not destroyed in its place', async () => {
    await host.vms.run(vmSpec());
    await host.vms.stop('vm', { isForced: true });
    const running = host.vms.run(vmSpec());
    await host.vms.destroy('vm');
    await running;
    expect(host.vms.list()).toMatchObject([{ name: 'vm', state: 'running' }]);
  });

  test('that is started again goes on from its last epoch, so that hosts which knew it still take it', async () => {
    await host.vms.run(vmSpec());
    await host.registry.swapOwner('vm', 1, { vm: 'vm', owner: 'A', epoch: 5, session: null });
    await host.vms.setState('vm', 'running', { epoch: 5 });
    await host.vms.stop('vm', { isForced: true });
    await host.vms.stop('vm', { isForced: true });
    expect(await host.registry.owner('vm')).toBeNull();
    expect(await host.vms.run(vmSpec())).toMatchObject({ epoch: 6 });
  });

  test('that has departed keeps its memory even if QEMU ends', async () => {
    await host.vms.run(vmSpec());
    await host.vms.setState('vm', 'departed');
    const seen = host.exits();
    process.kill(host.vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length).toBe(1);
    await host.restart();
    expect(host.vms.list()[0]).toMatchObject({ state: 'departed', pid: null });
    await access(host.vms.get('vm').regions[0]?.path ?? '');
  });

  test('that has departed is freed by its user once no job has it, and not before, by force neither', async () => {
    await host.vms.run(vmSpec());
    const { pid } = host.vms.get('vm');
    await host.vms.reserve('vm', 'job-1');
    await host.vms.setState('vm', 'departed');
    await host.registry.swapOwner('vm', 1, { vm: 'vm', owner: 'B', epoch: 2, session: null });
    expect(await codeOf(host.vms.stop('vm', { isForced: false }))).toBe('VM_BUSY');
    expect(await codeOf(host.vms.stop('vm', { isForced: true }))).toBe('CONFLICT');
    expect(() => process.kill(pid, 0)).not.toThrow();
    await host.vms.unreserve('vm', 'job-1');
    expect(await codeOf(host.vms.resume('vm'))).toBe('CONFLICT');
    await host.vms.stop('vm', { isForced: false });
    expect(host.vms.list()).toEqual([]);
    expect(await host.qemus()).toEqual([]);
    expect(await readdir(host.ramDir)).toEqual([]);
    expect(await host.registry.owner('vm')).toMatchObject({ owner: 'B', epoch: 2 });
  });

  test('answers pre-flight', async () => {
    await host.vms.run(vmSpec({ nics: [{}] }));
    const vm = host.vms.get('vm');
    expect(await vm.process.facts.migrationBlockers()).toEqual([]);
    expect(await ramFacts(vm)).toEqual({ isRamShared: true, isRamNamedFile: true });
    expect(await vm.process.facts.deviceChanges(vm.spec)).toEqual([]);
    const qmp = qmpOf(vm);
    const port = { driver: 'virtserialport', id: 'added', bus: 'vmg-serial.0', name: 'x.y' };
    await qmp.executeUntyped('device_add', port);
    expect(await vm.process.facts.deviceChanges(vm.spec)).toEqual([
      'device added (virtserialport) was added while the VM ran',
    ]);
    await qmp.executeUntyped('device_del', { id: 'added' });
    await host.vms.run(vmSpec({ name: 'private', memory: { size: '64M', backing: 'private' } }));
    expect(await ramFacts(host.vms.get('private'))).toEqual({ isRamShared: false, isRamNamedFile: false });
    const image = join(host.directory, 'disk.vdi');
    await run('qemu-img', ['create', '-f', 'vdi', image, '1M']);
    const blockdev = `driver=vdi,node-name=stuck,file.driver=file,file.filename=${image}`;
    await host.vms.run(vmSpec({ name: 'stuck', qemuArgs: ['-blockdev', blockdev] }));
    const stuck = host.vms.get('stuck');
    expect(await stuck.process.facts.migrationBlockers()).toEqual([expect.stringContaining('vdi')]);
    expect(await stuck.process.facts.openFiles()).toEqual([{ path: image, isReadOnly: false }]);
    expect(await stuck.process.facts.deviceChanges(stuck.spec)).toEqual([]);
    const facts = await hostFacts(host.vms);
    expect(facts.vmNames.toSorted()).toEqual(['private', 'stuck', 'vm']);
    expect(facts.qemuVersion).toMatch(/^\d+\.\d+\.\d+$/);
    expect(facts.memoryAvailableBytes).toBeGreaterThan(0);
    expect(facts.ramFileFreeBytes).toBeGreaterThan(0);
  });
});

describe('a target', () => {
  const incoming = { session: 's1', accel: 'tcg', epoch: 7 } as const;

  test('waits, survives a restart, and is not started by users', async () => {
    const vm = await host.vms.prepareIncoming(
      vmSpec({ memory: { regions: [{ size: '32M' }, { size: '32M' }] } }),
      incoming,
    );
    expect(vm).toMatchObject({ state: 'incoming', session: 's1', epoch: 7 });
    expect(await qmpOf(vm).execute('query-status')).toMatchObject({ status: 'inmigrate' });
    expect(await host.vms.prepareIncoming(vmSpec(), incoming)).toBe(vm);
    expect(await codeOf(host.vms.resume('vm'))).toBe('CONFLICT');
    await host.restart();
    expect(host.vms.get('vm')).toMatchObject({ state: 'incoming', session: 's1' });
    expect(host.vms.presencePath('vm', 'ram0')).toBe(join(host.ramDir, 'vm/ram0.presence'));
  });

  test('of an epoch that is not newer is refused', async () => {
    await host.registry.swapOwner('vm', null, { vm: 'vm', owner: 'A', epoch: 7, session: null });
    expect(await codeOf(host.vms.prepareIncoming(vmSpec(), incoming))).toBe('OWNER_CHANGED');
  });

  test('is removed while it is still starting', async () => {
    const preparing = codeOf(host.vms.prepareIncoming(vmSpec(), incoming));
    await expect.poll(() => host.vms.has('vm')).toBe(true);
    await host.vms.destroy('vm');
    expect(['CANCELLED', 'QEMU_GONE', 'QEMU_FAILED', 'resolved']).toContain(await preparing);
    expect(host.vms.list()).toEqual([]);
  });

  // The test copies the memory itself. It shows that both command lines give the guest the same machine.
  test('carries on where the source was stopped', async () => {
    const append = 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16 vmg.restpct=75';
    const devices = {
      nics: [{}, {}],
      cpus: 2,
      devices: ['virtio-rng-pci'],
      disks: [{ path: join(host.directory, 'disk') }],
    };
    const regions = [{ size: '96M' }, { size: '96M' }];
    await writeFile(join(host.directory, 'disk'), Buffer.alloc(1 << 20));
    await host.vms.run(vmSpec({ ...guestImage(), append, ...devices, memory: { regions } }));
    const source = host.vms.get('vm');
    await expect
      .poll(() => readFile(host.vms.serialPaths('vm').log, 'utf8'), { timeout: 90_000 })
      .toContain('VMG WORK');
    const other = await VmHost.start('B');
    try {
      const target = await other.vms.prepareIncoming(source.spec, incoming);
      const capabilities = [{ capability: 'x-ignore-shared', state: true } as const];
      await qmpOf(source).execute('migrate-set-capabilities', { capabilities });
      await qmpOf(target).execute('migrate-set-capabilities', { capabilities });
      await qmpOf(source).execute('stop');
      for (const [index, region] of source.regions.entries()) {
        const to = target.regions[index]?.path ?? '';
        await run('dd', [`if=${region.path}`, `of=${to}`, 'bs=1M', 'conv=notrunc,sparse']);
      }
      await qmpOf(target).execute('migrate-incoming', { uri: 'tcp:127.0.0.1:0' });
      const [place] = (await qmpOf(target).execute('query-migrate'))['socket-address'] ?? [];
      await qmpOf(source).execute('migrate', { uri: `tcp:127.0.0.1:${place?.type === 'inet' ? place.port : ''}` });
      const status = async () => (await qmpOf(target).execute('query-status')).status;
      await expect.poll(status).toBe('paused');
      await expect.poll(async () => (await qmpOf(source).execute('query-migrate')).status).toBe('completed');
      await host.vms.destroy('vm');
      await other.vms.setState('vm', 'running');
      await qmpOf(target).execute('cont');
      expect(other.vms.list()[0]).toMatchObject({ state: 'running', epoch: 7 });
      const { socket, log } = other.vms.serialPaths('vm');
      const line = await openConsole({ socketPath: socket, logPath: log, backlogBytes: 0, isFollowing: true });
      line.write('verify\n');
      expect(await expectOutput(line, /VERIFY pages \d+ bad \d+/, 60_000)).toContain('pages 4096 bad 0');
      line.destroy();
    } finally {
      expect(await other.close()).toEqual([]);
    }
  });
});

describe('nothing is left of a start that fails', () => {
  afterEach(async () => {
    expect(host.vms.list()).toEqual([]);
    expect(await host.registry.owner('vm')).toBeNull();
  });

  test.each([
    ['an unknown option', { qemuArgs: ['-no-such-option'] }, /no-such-option/],
    ['an unknown device', { devices: ['no-such-device'] }, /no-such-device/],
    ['a missing kernel', { kernel: '/no/such/kernel' }, /no\/such\/kernel/],
    ['a missing disk', { disks: [{ path: '/no/such/disk' }] }, /no\/such\/disk/],
  ])('%s: QEMU_FAILED with what QEMU said', async (_what, change, words) => {
    const error: unknown = await host.vms.run(vmSpec(change)).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ code: 'QEMU_FAILED', message: expect.stringMatching(words) as string });
  });

  test.each([
    ['an unknown machine', { machine: 'pc-q35-99.9' }, 'UNSUPPORTED'],
    ['the preload, where there is none', { preload: true }, 'UNSUPPORTED'],
    ['more memory than there is', { memory: { size: '15T' } }, 'OUT_OF_MEMORY'],
    ['huge pages that nobody has mounted', { memory: { size: '1G', pageSize: '1G' } }, 'UNSUPPORTED'],
    ['a bridge that is not there', { nics: [{ bridge: 'no-such-bridge' }] }, 'NOT_FOUND'],
  ])('%s', async (_what, change, code) => {
    expect(await codeOf(host.vms.run(vmSpec(change)))).toBe(code);
  });

  test('a name too long for a socket', async () => {
    const stateDir = join(host.directory, 'x'.repeat(60));
    await mkdir(stateDir);
    const vms = host.manager(stateDir);
    await vms.start();
    expect(await codeOf(vms.run(vmSpec({ name: 'n'.repeat(60) })))).toBe('SPEC_INVALID');
    await vms.close();
  });

  test('a crash in the middle of a start: the next daemon removes it', async () => {
    await host.vms.run(vmSpec());
    await host.restart(async () => {
      // The state between QEMU's start and the record of its pid.
      await amendRecord('vm', () => ({ state: 'starting', process: null }));
    });
    expect(await host.qemus()).toEqual([]);
  });
});

test('a record that cannot be read keeps its name, and harms no other', async () => {
  const bad = join(host.directory, 'state/vms/bad');
  await host.vms.run(vmSpec({ name: 'good' }));
  await host.restart(async () => {
    await mkdir(bad);
    await writeFile(join(bad, 'record.json'), '{"version":1,');
  });
  expect(host.vms.list().map(({ name, state, pid }) => [name, state, pid !== null])).toEqual([
    ['bad', 'unreadable', false],
    ['good', 'running', true],
  ]);
  expect(await codeOf(host.vms.run(vmSpec({ name: 'bad' })))).toBe('CORRUPT');
  await rm(bad, { recursive: true });
});

describe('a VM whose record does not say which process it is', () => {
  test('is kept and taken over, also from the record of an earlier process', async () => {
    const { pid } = await host.vms.run(vmSpec());
    for (const change of [
      (process: object) => ({ process: { ...process, startTicks: '1' } }),
      (process: object) => ({ process: { ...process, pid: 2 } }),
      () => ({ process: null, state: 'stopped', exit: { at: '', reason: 'killed', code: null, signal: null } }),
    ]) {
      await host.restart(() => amendRecord('vm', (record) => change(record.process as object)));
      expect(host.vms.list()).toMatchObject([{ name: 'vm', state: 'running', pid, exit: null }]);
      expect(await readdir(host.ramDir)).toEqual(['vm']);
    }
  });

  test('is shown and not touched if a bit of its record is wrong', async () => {
    const { pid } = await host.vms.run(vmSpec());
    const path = join(host.directory, 'state/vms/vm/record.json');
    const whole = await readFile(path);
    const damaged = Buffer.from(whole);
    const at = damaged.indexOf('"startTicks": "') + '"startTicks": "'.length;
    damaged[at] = damaged[at]! ^ 1;
    await host.restart(() => writeFile(path, damaged));
    expect(host.vms.list()).toMatchObject([{ name: 'vm', state: 'unreadable', pid, memoryBytes: 64 << 20 }]);
    for (const call of [host.vms.run(vmSpec()), host.vms.stop('vm', { isForced: true }), host.vms.pause('vm')])
      await expect(call).rejects.toMatchObject({
        code: 'CORRUPT',
        message: expect.stringContaining(`its process ${pid} runs on`) as string,
        remedy: expect.stringContaining('vmctl state repair') as string,
      });
    expect(await readdir(host.ramDir)).toEqual(['vm']);
    await host.restart(() => writeFile(path, whole));
    expect(host.vms.list()).toMatchObject([{ state: 'running', pid }]);
  });

  test('is not forgotten if it has no record at all', async () => {
    const { pid } = await host.vms.run(vmSpec());
    const path = join(host.directory, 'state/vms/vm/record.json');
    const whole = await readFile(path);
    await host.restart(() => rm(path));
    expect(host.vms.list()).toMatchObject([{ state: 'unreadable', pid }]);
    await host.restart(() => writeFile(path, whole));
    expect(host.vms.list()).toMatchObject([{ state: 'running', pid }]);
  });
});

/** Changes a record as an earlier daemon, or a backup, could have left it. */
async function amendRecord(vm: string, change: (record: Record<string, unknown>) => object): Promise<void> {
  const path = join(host.directory, 'state/vms', vm, 'record.json');
  const record = unseal(await readFile(path, 'utf8'), path) as Record<string, unknown>;
  await writeFile(path, seal({ ...record, ...change(record) }));
}

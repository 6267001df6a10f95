/** What the doctor says of limits, permissions and the installed QEMU, for inventories that name them. */
import { expect, test } from 'vitest';
import { doctor } from '../../../src/api/public/doctor.js';
import type { HostInventory, HostLimits } from '../../../src/domain/host.js';
import type { DoctorCheck } from '../../../src/schemas/host.js';
import { fakeServices } from '../../support/api-fakes.js';
import { goodFacts } from '../planner/planner-facts.js';

const LIMITS: HostLimits = {
  openFiles: { used: 100, max: 20_000 },
  openFilesOfHost: { used: 3000, max: 900_000 },
  tasks: { used: 300, max: 30_000 },
  mappings: { used: 200, max: 65_530 },
  fileWatchesMax: 8192,
};

async function checks(change: Partial<HostInventory>): Promise<Record<string, DoctorCheck>> {
  const services = fakeServices();
  services.answers.set('inventory', () => ({ ...goodFacts().sourceHost, ...change }));
  return Object.fromEntries((await doctor(services)).map((check) => [check.name, check]));
}

test('limits that are wide enough are told with what is in use', async () => {
  const found = await checks({ limits: LIMITS });
  expect(found['open files']).toMatchObject({
    status: 'ok',
    text: '100 of 20000 in use; a VM or clone takes about 12, so 1655 more fit',
  });
  for (const name of ['files of host', 'tasks', 'mappings', 'file watches']) expect(found[name]?.status).toBe('ok');
});

test('each narrow limit is a warning with the place where it is raised', async () => {
  const found = await checks({
    limits: {
      openFiles: { used: 100, max: 256 },
      openFilesOfHost: { used: 9000, max: 9001 },
      tasks: { used: 480, max: 500 },
      mappings: { used: 60_000, max: 61_000 },
      fileWatchesMax: 100,
    },
  });
  expect(found['open files']).toMatchObject({ status: 'warn', text: expect.stringMatching(/so 10 more fit, fewer/) });
  const remedies = ['open files', 'files of host', 'tasks', 'mappings', 'file watches'].map((name) => found[name]);
  expect(remedies.map((check) => check?.status)).toEqual(Array(5).fill('warn'));
  for (const [index, place] of [/LimitNOFILE/, /fs\.file-max/, /TasksMax/, /vm\.max_map_count/, /inotify/].entries())
    expect(remedies[index]?.remedy).toMatch(place);
});

test('a multicast that gets to some peers only is a warning with their names', async () => {
  const said = async (names: readonly string[], heard: unknown) => {
    const services = fakeServices();
    services.answers.set('inventory', () => goodFacts().sourceHost);
    services.answers.set('probeMulticast', () => heard);
    const peers = { ...services.peers, names, check: async () => ({ roundTripMs: 1 }), url: () => 'https://b' };
    return (await doctor({ ...services, peers })).find(({ name }) => name === 'multicast');
  };
  expect(await said(['B'], [])).toMatchObject({ status: 'ok', text: expect.stringContaining('not used') });
  const some = [
    { host: 'B', largestBytes: 1500 },
    { host: 'C', largestBytes: 0 },
  ];
  expect(await said(['B', 'C'], some)).toMatchObject({ status: 'warn', text: expect.stringMatching(/ C:/) });
  const all = [
    { host: 'B', largestBytes: 9000 },
    { host: 'C', largestBytes: 1500 },
  ];
  expect((await said(['B', 'C'], all))?.text).toContain('datagrams of 1500 bytes');
});

test('a host of an earlier build, or without limits, gets no wrong line', async () => {
  expect(Object.keys(await checks({}))).not.toContain('open files');
  const none = { openFiles: null, openFilesOfHost: null, tasks: null, mappings: null, fileWatchesMax: null };
  expect((await checks({ limits: none }))['tasks']).toMatchObject({ status: 'ok', text: 'no limit' });
});

test('a user without rights is told of the rights, not to replace the kernel', async () => {
  const found = await checks({ isUserfaultfdPermitted: false, hasMinorFaults: false });
  expect(found['minor faults']).toMatchObject({ status: 'fail', remedy: expect.stringContaining('as root') });
  expect(found['minor faults']?.text).not.toContain('not supported');
});

test('a kernel that cannot note writes is a warning, which names what does not work', async () => {
  const pushes = async (change: Partial<HostInventory>) => (await checks(change))['pushes'];
  expect(await pushes({ canTrackWrites: true })).toMatchObject({ status: 'ok' });
  const old = { status: 'warn', text: expect.stringContaining('--precopy'), remedy: expect.stringContaining('6.9') };
  expect(await pushes({ canTrackWrites: false })).toMatchObject(old);
  expect(await pushes({ canTrackWrites: false, isUserfaultfdPermitted: false })).toMatchObject({
    status: 'warn',
    remedy: expect.stringContaining('as root'),
  });
});

test('a QEMU that does not work is named', async () => {
  const qemuProblem = '/usr/bin/qemu-nope does not work: spawn /usr/bin/qemu-nope ENOENT';
  const found = await checks({ qemuVersion: null, machines: [], qemuProblem });
  expect(found['QEMU']).toMatchObject({ status: 'fail', text: qemuProblem });
});

test('a daemon without a tmpfs of its own for guest memory says why', async () => {
  expect((await checks({}))['guest memory']?.status).toBe('ok');
  const ramDirProblem = 'no tmpfs can be mounted on /run/vmigrate/A/ram: permission denied';
  expect((await checks({ ramDirProblem }))['guest memory']).toMatchObject({
    status: 'warn',
    text: expect.stringContaining(ramDirProblem),
    remedy: expect.stringMatching(/CAP_SYS_ADMIN.*--ram-dir/),
  });
});

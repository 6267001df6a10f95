import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmod,
  chown,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { VmCgroups } from '../../../../src/agent/contain/cgroups.js';
import type { VmPlace } from '../../../../src/backends/backend.js';
import {
  addFile,
  changeFileList,
  type FileList,
  writeFileList,
} from '../../../../src/backends/qemu/launcher/file-list.js';
import { launched, rootPath } from '../../../../src/backends/qemu/launcher/launcher.js';
import { connectUnix, listenUnix } from '../../../../src/kit/unix-socket.js';

const UID = 64_055;

let directory: string;
let place: VmPlace;
const at = (name: string): string => join(directory, name);

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-launcher-'));
  const paths = { serialPath: at('qemu/serial.sock'), serialLogPath: at('serial.log'), exitPath: at('exit') };
  const others = { agentPath: at('qemu/agent.sock'), outputPath: at('log') };
  place = { name: 'vm', directory, socketDirectory: at('qemu'), ...paths, ...others };
  await mkdir(place.socketDirectory);
  await chown(place.socketDirectory, 0, UID);
  await chmod(place.socketDirectory, 0o1770);
  await mkdir(rootPath(place));
});
afterEach(() => rm(directory, { recursive: true }));

async function start(
  command: readonly string[],
  list: FileList = new Map(),
  cgroups: readonly string[] = [],
): Promise<ChildProcess> {
  await writeFileList(place, list);
  const [program = '', ...args] = command;
  const container = { uid: UID, cgroups, taps: [], hasPostcopy: false, socketDirectories: [] };
  const { program: launcher, args: words } = launched({ program, args, environment: {} }, place, container);
  return spawn(launcher, words, { stdio: 'ignore', detached: true });
}

/** Runs bash, and returns what it has said. */
async function said(script: string, list: FileList = new Map()): Promise<string> {
  const child = await start(['/bin/bash', '-c', script], list);
  await once(child, 'exit');
  await expect.poll(() => stat(at('spooling')).catch(() => null)).toBeNull();
  const text = await readFile(place.outputPath, 'utf8');
  await rm(place.outputPath);
  return text.trim();
}

describe('the keeper', () => {
  test('opens what is on the list, in the way that the list says', async () => {
    const list: FileList = new Map();
    const names = { read: 'r', write: 'w', copied: 'p' } as const;
    for (const [use, name] of Object.entries(names)) {
      await writeFile(at(name), `${use}\n`, { mode: 0o600 });
      addFile(list, at(name), use as keyof typeof names);
    }
    await writeFile(at('none'), 'none\n', { mode: 0o600 });
    expect(await said(`cat ${at('r')} ${at('w')} ${at('p')}`, list)).toBe('read\nwrite\ncopied');
    expect(await said(`cat ${at('none')}`, list)).toMatch(/No such file/);
    expect(await said(`echo more >>${at('w')}`, list)).toBe('');
    expect(await said(`echo more >>${at('r')}`, list)).toMatch(/Permission denied/);
    // The caller believes that it may write, and the file stays as it is.
    expect(await said(`exec 5<>${at('p')}; head -1 <&5; echo more >&5`, list)).toMatch(/copied\n.*Bad file descriptor/);
    expect(await said(`exec 5>${at('p')}`, list)).toBe('');
    expect(await readFile(at('p'), 'utf8')).toBe('copied\n');
    expect(await readFile(at('w'), 'utf8')).toBe('write\nmore\n');
  });

  test('opens by the name that it has been given, and nothing that is named otherwise', async () => {
    await writeFile(at('r'), 'read\n', { mode: 0o600 });
    const list: FileList = new Map([[at('r'), 'read']]);
    for (const other of [`${directory}/./r`, `${directory}//r`, `/proc/self/root${at('r')}`, `${at('r')}x`])
      expect(await said(`cat ${other}`, list), other).toMatch(/No such file/);
    expect(await said(`cd ${directory}; cat r`, list)).toMatch(/No such file/);
  });

  test('tells why a file cannot be opened, and does not wait for one that nobody writes', async () => {
    execFileSync('mkfifo', [at('fifo')]);
    const list: FileList = new Map([at('fifo'), at('gone')].map((path) => [path, 'read']));
    expect(await said(`cat ${at('gone')}; cat ${at('fifo')}`, list)).toMatch(
      /gone: No such file.*\n.*Permission denied/,
    );
  });

  test('follows the list while the program runs', async () => {
    await writeFile(at('late'), 'late\n', { mode: 0o600 });
    const cat = `cat ${at('late')}`;
    const script = `until ${cat} 2>&-; do sleep 0.02; done; while ${cat}; do sleep 0.02; done`;
    const child = await start(['/bin/bash', '-c', script]);
    const ended = once(child, 'exit');
    await changeFileList(place, (list) => addFile(list, at('late'), 'read'));
    await expect.poll(() => readFile(place.outputPath, 'utf8')).toContain('late');
    await changeFileList(place, (list) => list.delete(at('late')));
    await ended;
    expect(await readFile(place.outputPath, 'utf8')).toMatch(/^(late\n)+cat: .*No such file/);
  });

  test('opens nothing by a list that is not whole', async () => {
    await writeFile(at('r'), 'read\n', { mode: 0o600 });
    await writeFileList(place, new Map());
    await writeFile(at('files.cut'), `r ${at('r')}`);
    const child = await start(['/bin/bash', '-c', `sleep 0.2; cat ${at('r')}`]);
    await rename(at('files.cut'), at('files'));
    await once(child, 'exit');
    await expect.poll(() => readFile(place.outputPath, 'utf8')).toMatch(/No such file/);
  });

  test('that is killed leaves a program that can open nothing', async () => {
    const onSignal = 'if (exec 5</usr/bin/env); then exit 7; else exit 9; fi';
    const loop = 'echo ready; while :; do :; done';
    const child = await start(['/bin/bash', '-c', `trap '${onSignal}' USR1; ${loop}`]);
    await expect.poll(() => readFile(place.outputPath, 'utf8').catch(() => '')).toBe('ready\n');
    const keeper = await keeperOf(child.pid ?? 0);
    process.kill(keeper, 'SIGKILL');
    await expect.poll(() => readFile(`/proc/${keeper}/stat`, 'utf8').catch(() => '')).toBe('');
    process.kill(child.pid ?? 0, 'SIGUSR1');
    expect(await once(child, 'exit')).toEqual([9, null]);
  });
});

describe('a contained program', () => {
  test('makes its sockets in its directory, and cannot replace those of the daemon', async () => {
    const server = createServer((socket: Socket) => socket.end('hello'));
    await listenUnix(server, at('qemu/daemon.sock'));
    const name = at('qemu/daemon.sock');
    const bind = `python3 -Bc "import socket; socket.socket(socket.AF_UNIX).bind('${at('qemu/own.sock')}')"`;
    const attempts = [`rm -f ${name}`, `mv ${name} ${at('qemu/x')}`, `touch ${at('qemu/x')}`, `mkdir ${at('qemu/x')}`];
    const links = [`ln -s x ${at('qemu/x')}`, `ln ${at('qemu/own.sock')} ${at('qemu/x')}`, `mkfifo ${at('qemu/x')}`];
    try {
      const lines = (await said(['id -u', bind, ...attempts, ...links].join('; '))).split('\n');
      expect(lines.shift()).toBe(String(UID));
      expect(lines).toHaveLength(attempts.length + links.length);
      for (const line of lines) expect(line).toMatch(/not permitted|Permission denied/);
      expect((await readdir(at('qemu'))).sort()).toEqual(['daemon.sock', 'own.sock']);
    } finally {
      server.close();
    }
  });

  test('leads nobody to another socket who connects without following links', async () => {
    const server = createServer((socket: Socket) => socket.end('hello'));
    await listenUnix(server, at('other.sock'));
    try {
      await symlink('../other.sock', at('qemu/link.sock'));
      await writeFile(at('qemu/file.sock'), '');
      for (const name of ['link', 'file'])
        await expect(once(connectUnix(at(`qemu/${name}.sock`)), 'connect')).rejects.toMatchObject({ code: 'ENOTSOCK' });
      await expect(once(connectUnix(at('qemu/none.sock')), 'connect')).rejects.toMatchObject({ code: 'ENOENT' });
      const [text] = (await once(connectUnix(at('other.sock')), 'data')) as [Buffer];
      expect(text.toString()).toBe('hello');
    } finally {
      server.close();
    }
  });
});

test('a contained program gets no other rights, and no more of the host, by system calls', async () => {
  const list: FileList = new Map([[directory, 'read']]);
  expect(await said(`exec 5<${directory}`, list), 'a directory of the host').toMatch(/Permission denied/);
  expect(await said('unshare --user --map-root-user id')).toMatch(/not permitted/);
  expect(await said('unshare --net id')).toMatch(/not permitted/);
  // The host has what this process has made, and the program has a space of its own.
  const id = /\d+/.exec(execFileSync('ipcmk', ['-M', '4096']).toString())?.[0] ?? '';
  try {
    expect(await said('ipcs -m')).not.toContain(` ${id} `);
  } finally {
    execFileSync('ipcrm', ['-m', id]);
  }
});

describe('a program that is to be in cgroups', () => {
  test('opens nothing for writing before it is in them', async () => {
    const cgroups = await VmCgroups.open('launcher-test', directory);
    const made = await cgroups.make('vm');
    await writeFile(at('w'), '');
    try {
      const script = `exec 5>>${at('w')}; exec cat /proc/self/cgroup`;
      await once(await start(['/bin/bash', '-c', script], new Map([[at('w'), 'write']]), made), 'exit');
      await expect.poll(() => stat(at('spooling')).catch(() => null)).toBeNull();
      const own = (await readFile(place.outputPath, 'utf8')).split('\n').filter((line) => line.endsWith('/vm-vm'));
      expect(own).toHaveLength(made.length);
    } finally {
      await cgroups.remove('vm');
      await cgroups.close();
    }
  });

  test('is killed if it cannot be', async () => {
    const list: FileList = new Map([[at('w'), 'write']]);
    await writeFile(at('w'), '');
    const script = `exec 5>>${at('w')} && echo ran >&5; sleep 60`;
    const child = await start(['/bin/bash', '-c', script], list, [at('none')]);
    expect(await once(child, 'exit')).toEqual([null, 'SIGKILL']);
    await expect.poll(() => stat(at('spooling')).catch(() => null)).toBeNull();
    expect(await readFile(place.outputPath, 'utf8')).toMatch(/cannot join the cgroup .*none: No such file/);
    expect(await readFile(at('w'), 'utf8')).toBe('');
  });
});

test('a path that a list cannot hold is refused', async () => {
  for (const path of ['disk.raw', '/srv/a\nw /etc/shadow'])
    await expect(writeFileList(place, new Map([[path, 'read']]))).rejects.toMatchObject({ code: 'SPEC_INVALID' });
});

/** The process that has the program's output open for reading. */
async function keeperOf(pid: number): Promise<number> {
  const pipe = await readlink(`/proc/${pid}/fd/1`);
  const found = execFileSync('bash', [
    '-c',
    `ls -l /proc/[0-9]*/fd 2>/dev/null | awk '/^\\/proc/ {p=$1} /${pipe.replace(/[[\]]/g, '.')}/ {print p}'`,
  ]);
  const pids = [...found.toString().matchAll(/\/proc\/(\d+)\//g)].map(([, number]) => Number(number));
  return pids.find((each) => each !== pid) ?? 0;
}

/** Tries whether this host can contain a QEMU, with a program that does nothing. */
import { execFile } from 'node:child_process';
import { chown, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { VmPlace } from '../../backend.js';
import { addFile, type FileList, writeFileList } from './file-list.js';
import { launched, rootPath, untilKept } from './launcher.js';

/** Opens what only the keeper can open, and the device that QEMU's memory needs, unless the kernel does without. */
const SHELL = '/bin/sh';
const TRY = 'read -r line <"$1" && if [ "$2" != 1 ]; then : </dev/userfaultfd; fi';
const SYSCTL = '/proc/sys/vm/unprivileged_userfaultfd';
const RUN_MS_MAX = 10_000;
const KEPT_MS_MAX = 1_000;

/** Returns why a QEMU cannot run as this user in a root of its own, or null. */
export async function containmentProblem(uid: number): Promise<string | null> {
  const directory = await mkdtemp(join(tmpdir(), 'vmigrate-probe-'));
  const [outputPath, socketDirectory] = [join(directory, 'log'), join(directory, 'qemu')];
  const none = { serialPath: '', exitPath: '', agentPath: '', serialLogPath: join(directory, 'serial') };
  const place: VmPlace = { name: 'probe', directory, socketDirectory, outputPath, ...none };
  try {
    await mkdir(socketDirectory, { mode: 0o700 });
    await chown(socketDirectory, uid, uid);
    await mkdir(rootPath(place));
    const secret = join(directory, 'secret');
    await writeFile(secret, 'secret\n', { mode: 0o600 });
    const list: FileList = new Map();
    for (const path of [secret, '/dev/userfaultfd']) addFile(list, path, 'read');
    await writeFileList(place, list);
    const isForAll = (await readFile(SYSCTL, 'utf8').catch(() => '')).trim();
    const container = { uid, cgroups: [], taps: [], hasPostcopy: false, socketDirectories: [] };
    const { program, args } = launched(
      { program: SHELL, args: ['-c', TRY, 'probe', secret, isForAll], environment: {} },
      place,
      container,
    );
    await promisify(execFile)(program, [...args], { timeout: RUN_MS_MAX });
    return null;
  } catch (error) {
    await untilKept(directory, KEPT_MS_MAX);
    const said = (await readFile(outputPath, 'utf8').catch(() => '')).trim();
    return said === '' ? (error as Error).message : said;
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

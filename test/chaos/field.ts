/**
 * The hosts of a chaos run: memory files and state of each host are on small file systems of their own, so that a fault
 * can fill them without touching the machine.
 */
import { execFileSync } from 'node:child_process';
import { mkdir, open, rm, statfs } from 'node:fs/promises';
import { join } from 'node:path';
import { Cluster } from '../hosts/cluster.js';

const MIB = 2 ** 20;
const SIZES_MIB = { memory: 1024, state: 48 } as const;
const FILL_TRIES = 12;
const FILL_SLACK_BYTES = 32 * 1024;
const HOSTS = ['A', 'B', 'C'] as const;

export type FileSystem = keyof typeof SIZES_MIB;
const FILE_SYSTEMS: readonly FileSystem[] = ['memory', 'state'];

export class Field {
  private constructor(readonly cluster: Cluster) {}

  static async create(): Promise<Field> {
    const cluster = await Cluster.create({ hosts: HOSTS });
    const field = new Field(cluster);
    try {
      for (const host of HOSTS) await cluster.stopDaemon(host, 'SIGTERM');
      for (const host of HOSTS) {
        for (const kind of FILE_SYSTEMS) {
          await rm(field.path(host, kind), { recursive: true, force: true });
          await mkdir(field.path(host, kind), { mode: 0o700 });
          const options = `size=${SIZES_MIB[kind]}m,mode=0700`;
          execFileSync('mount', ['-t', 'tmpfs', '-o', options, 'none', field.path(host, kind)]);
        }
      }
      for (const host of HOSTS) await cluster.startDaemon(host);
      for (const host of HOSTS) await cluster.expectAcquaintance(host);
      return field;
    } catch (error) {
      await field.destroy();
      throw error;
    }
  }

  get hosts(): readonly string[] {
    return HOSTS;
  }

  others(host: string): string[] {
    return HOSTS.filter((other) => other !== host);
  }

  path(host: string, kind: FileSystem): string {
    return kind === 'memory' ? this.cluster.ramDirectory(host) : join(this.cluster.hostDirectory(host), 'state');
  }

  /**
   * Leaves no free block: makes the file system hardly larger than what is in it, and fills the rest. It cannot be made
   * smaller than its content, which may grow until it is resized, so what is left to fill doubles with each try.
   */
  async fill(host: string, kind: FileSystem): Promise<void> {
    for (let tries = 1; ; tries++) {
      const { blocks, bfree, bsize } = await statfs(this.path(host, kind));
      try {
        this.#resize(host, kind, (blocks - bfree) * bsize + FILL_SLACK_BYTES * 2 ** tries);
        break;
      } catch (error) {
        if (tries === FILL_TRIES) throw error;
      }
    }
    await appendUntilFull(this.#filler(host, kind));
  }

  async unfill(host: string, kind: FileSystem): Promise<void> {
    await rm(this.#filler(host, kind), { force: true });
    this.#resize(host, kind, SIZES_MIB[kind] * MIB);
  }

  #filler(host: string, kind: FileSystem): string {
    return join(this.path(host, kind), 'filler');
  }

  #resize(host: string, kind: FileSystem, sizeBytes: number): void {
    execFileSync('mount', ['-o', `remount,size=${sizeBytes}`, this.path(host, kind)], { stdio: 'pipe' });
  }

  async restart(host: string): Promise<void> {
    if (!this.cluster.isDaemonRunning(host)) await this.cluster.startDaemon(host);
  }

  async destroy(): Promise<void> {
    // The unmount is lazy, because QEMUs still have files there.
    for (const host of HOSTS)
      for (const kind of FILE_SYSTEMS) {
        try {
          execFileSync('umount', ['--lazy', this.path(host, kind)], { stdio: 'ignore' });
        } catch {
          // It was not mounted yet.
        }
      }
    await this.cluster.destroy();
  }
}

async function appendUntilFull(path: string): Promise<void> {
  const file = await open(path, 'a');
  try {
    for (;;) await file.write(Buffer.alloc(4096, 1));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
  } finally {
    await file.close();
  }
}

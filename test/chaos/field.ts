/**
 * The hosts of a chaos run: memory files and state of each host are on small file systems of their own, so that a fault
 * can fill them without touching the machine.
 */
import { execFileSync } from 'node:child_process';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { Cluster } from '../hosts/cluster.js';
import { fillTmpfs, freeTmpfs } from '../hosts/full-file-system.js';

const MIB = 2 ** 20;
const SIZES_MIB = { memory: 1024, state: 48 } as const;
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

  fill(host: string, kind: FileSystem): Promise<void> {
    return fillTmpfs(this.path(host, kind));
  }

  unfill(host: string, kind: FileSystem): Promise<void> {
    return freeTmpfs(this.path(host, kind), SIZES_MIB[kind] * MIB);
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

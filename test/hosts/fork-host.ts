/**
 * The agent of one host without a daemon, for forks, with real QEMU and the real addon. `fork` plays the coordinator,
 * in the engine's order.
 */
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MigrationError } from '../../src/domain/errors.js';
import type { CloneIdentity } from '../../src/domain/fork.js';
import type { VmSpec } from '../../src/domain/vm.js';
import type { ForkPointReply, ForkProgress, PrepareForkRequest, RunClonesReply } from '../../src/engine/ports/fork.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';
import { AgentHost } from './agent-pair.js';
import { eventually } from './cluster.js';
import { type GuestOptions, guestSpec, parseWork } from './guest.js';
import { Janitor } from './janitor.js';

const BOOT_MS = 90_000;
const FILL_MS = 60_000;

export interface ForkOutcome {
  readonly image: string;
  readonly isWarm: boolean;
  readonly clones: readonly CloneIdentity[];
  readonly point: ForkPointReply;
  readonly run: RunClonesReply;
  readonly progress: ForkProgress;
}

export class ForkHost {
  readonly host: AgentHost;
  readonly #janitor: Janitor;
  #isRamMounted = false;

  private constructor(readonly directory: string) {
    const none = () => {
      throw new MigrationError('NOT_FOUND', 'there is one host');
    };
    this.host = new AgentHost('A', directory, {
      agent: none,
      isPeer: () => true,
      sendState: none,
      sendForkState: none,
      openDisk: none,
      openStream: none,
      warm: async () => undefined,
    });
    this.#janitor = new Janitor({ paths: [directory, this.host.ramDir] });
  }

  /** With `ramMiB` the memory files are on a file system of that size. */
  static async start(options: { ramMiB?: number } = {}): Promise<ForkHost> {
    const host = new ForkHost(await mkdtemp(join(tmpdir(), 'vmg-')));
    if (options.ramMiB !== undefined) await host.#mountRam(options.ramMiB);
    await host.host.start();
    return host;
  }

  async #mountRam(ramMiB: number): Promise<void> {
    await mkdir(this.host.ramDir, { recursive: true });
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${ramMiB}m`, 'none', this.host.ramDir]);
    this.#isRamMounted = true;
  }

  /** Boots a guest and waits until its workload reports. */
  async boot(options: GuestOptions): Promise<VmSpec> {
    const { vms } = this.host;
    await vms.run(parseSpec(guestSpec(options)));
    await eventually(`${options.name} works`, BOOT_MS, async () =>
      parseWork(await this.host.serial(options.name)).length >= 5 ? true : undefined,
    );
    return vms.get(options.name).spec;
  }

  request(vm: string | null, change: Partial<PrepareForkRequest> = {}): PrepareForkRequest {
    return forkRequest(vm, change);
  }

  fork(request: PrepareForkRequest): Promise<ForkOutcome> {
    return forkOn(this.host, request);
  }

  filled(fork: string): Promise<ForkProgress> {
    return filledOn(this.host, fork);
  }

  traces(): string[] {
    return this.host.forkTraces();
  }

  clear(): Promise<void> {
    return this.host.clear();
  }

  async end(): Promise<void> {
    await this.clear();
    await this.host.stop();
    // The unmount is lazy, because a killed QEMU may still be freeing its pages.
    if (this.#isRamMounted) execFileSync('umount', ['--lazy', this.host.ramDir]);
    await rm(this.host.ramDir, { recursive: true, force: true });
    await rm(this.directory, { recursive: true, force: true });
    this.#janitor.dismiss();
  }
}

export function forkRequest(vm: string | null, change: Partial<PrepareForkRequest> = {}): PrepareForkRequest {
  return {
    fork: randomBytes(8).toString('hex'),
    job: 'job-1',
    vm,
    image: null,
    cloneCount: 2,
    namePrefix: null,
    parentMode: 'continue',
    memory: 'cow',
    network: 'none',
    disks: 'overlay',
    isPartialAllowed: false,
    ...change,
  };
}

export async function forkOn(host: AgentHost, request: PrepareForkRequest): Promise<ForkOutcome> {
  const { agent } = host;
  const { fork, vm, job } = request;
  if (vm !== null) await agent.source.reserve(vm, job);
  const { clones, image, isWarm } = await agent.forks.prepareClones(request);
  await agent.forks.armParent(fork);
  const point = await agent.forks.forkPoint(fork);
  await agent.forks.loadClones(fork);
  await agent.forks.commitFork(fork);
  const run = await agent.forks.runClones(fork);
  const progress = await filledOn(host, fork);
  await agent.forks.finishFork(fork);
  if (vm !== null) await agent.source.unreserve(vm, job);
  return { image, isWarm, clones, point, run, progress };
}

function filledOn(host: AgentHost, fork: string): Promise<ForkProgress> {
  return eventually('the image is complete', FILL_MS, async () => {
    const progress = await host.agent.forks.forkProgress(fork);
    if (progress.state === 'failed') throw new Error(JSON.stringify(progress));
    return progress.state === 'complete' ? progress : undefined;
  });
}

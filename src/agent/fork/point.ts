/**
 * The fork point: the moment whose devices, disks and memory every clone starts with. The parent is stopped during it.
 *
 *   running ─ stop ─► stopped ────── protect, snapshot of the disks ─ save ─► state saved ─ seal ─ resume ────► running
 *                     └─────────────────────────────── the pause ──────────────────────────────────────────┘
 *
 * All memory was write-protected before, while the parent ran (arm), so protect handles only the pages written since
 * then. Protect comes first because it takes the longest. Writes of QEMU itself to guest memory while it saves the
 * devices are recorded like any write, and seal protects these pages again. After seal a write of the parent waits
 * until its page has been copied.
 */
import { writeFile } from 'node:fs/promises';
import type { StateExport, StateStream } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { ForkPointReply } from '../../engine/ports/fork.js';
import type { InjectPort } from '../../engine/ports/inject.js';
import type { ImageCaptureHandle } from '../../native/types.js';
import type { ForkContext } from './context.js';
import type { ForkPages } from './pages.js';
import type { ParentDisks } from './parent-disks.js';
import type { ForkRecord } from './record.js';

/** Upper bound of the parent's device state. A healthy QEMU sends less than 1 MB. */
const STATE_BYTES_MAX = 1024 * 1024 * 1024;

export interface ForkPointOptions {
  /** Exports the parent's device state. */
  readonly state: StateExport;
  /** Null if the parent stays stopped: its memory files then are the image. */
  readonly capture: ImageCaptureHandle | null;
  /**
   * True if the caller starts the sweep later, because copying pages that no VM has asked for would take the processors
   * from clones that are about to start.
   */
  readonly isSweepLater: boolean;
  readonly statePath: string;
  /** Makes the disks' current files read-only for all VMs. Called while the parent is stopped. */
  readonly snapshotDisks: () => Promise<void>;
  readonly inject: InjectPort;
}

/** If it rejects, the parent may be stopped. The caller then resumes it. */
export async function takeForkPoint(options: ForkPointOptions): Promise<ForkPointReply> {
  const { state, capture, inject } = options;
  const chunks: Buffer[] = [];
  const { stoppedAtUs } = await state.stop((stream) => collect(stream, chunks));
  const noticedAtMs = performance.now();
  const parts = [{ name: 'stop', ms: Date.now() - stoppedAtUs / 1000 }];
  let sinceMs = noticedAtMs;
  const note = (name: string): void => {
    const nowMs = performance.now();
    parts.push({ name, ms: nowMs - sinceMs });
    sinceMs = nowMs;
  };
  await inject.hit('agent:fork:stopped');
  await Promise.all([capture?.protect(), options.snapshotDisks()]);
  note('protect');
  const { deviceStateBytes } = await state.transfer();
  note('deviceState');
  await inject.hit('agent:fork:saved');
  if (capture === null) {
    await writeFile(options.statePath, chunks);
    note('write');
    return { parentPauseMs: Date.now() - stoppedAtUs / 1000, deviceStateBytes, parts };
  }
  await capture.seal({ isSweepLater: options.isSweepLater });
  note('seal');
  const resumedAtUs = await state.resume();
  note('resume');
  await writeFile(options.statePath, chunks);
  return { parentPauseMs: (resumedAtUs - stoppedAtUs) / 1000, deviceStateBytes, parts };
}

async function collect(stream: StateStream, chunks: Buffer[]): Promise<number> {
  let bytes = 0;
  for await (const chunk of stream) {
    chunks.push(chunk as Buffer);
    bytes += (chunk as Buffer).length;
    if (bytes > STATE_BYTES_MAX) {
      throw new MigrationError('QEMU_FAILED', `the device state exceeds ${STATE_BYTES_MAX} bytes`);
    }
  }
  return bytes;
}

/** Takes the fork point of a fork, and records it. Other hosts may read the image from then on. */
export async function takeForkPointOf(
  { images, inject, log, diskServer }: ForkContext,
  { image, request }: ForkRecord,
  { state, disks, pages }: { state: StateExport; disks: ParentDisks; pages: ForkPages },
): Promise<ForkPointReply> {
  await inject.hit('agent:fork:point');
  const reply = await takeForkPoint({
    state,
    capture: pages.capture?.handle ?? null,
    // Private clones start only when the image is complete, so the sweep must not wait for them.
    isSweepLater: !pages.isPrivate,
    statePath: images.statePath(image),
    snapshotDisks: () => disks.snapshot(),
    inject,
  });
  log.debug({ fork: request.fork, ...reply }, 'fork point');
  await inject.hit('agent:fork:pointed');
  await disks.settle();
  await images.update(image, { deviceStateBytes: reply.deviceStateBytes });
  await diskServer.fix(image);
  await pages.fix();
  return reply;
}

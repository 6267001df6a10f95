/**
 * The moment that a fork is about: the parent stands still, and its devices, its disks and its memory are those that
 * every clone begins with.
 *
 *   running ─ stop ─► stands still ─ protect, snapshot of the disks ─ save ─► state saved ─ seal ─ run again ─► running
 *                     └─────────────────────────────── the pause ──────────────────────────────────────────┘
 *
 * All memory was write-protected before, while the parent ran (arm), so protect has only what was written since. It
 * comes first because it has the most to do; what QEMU itself writes into guest memory while it saves devices is noted
 * as any write, and seal protects that again. From seal on a write of the parent waits until its page is copied.
 */
import { writeFile } from 'node:fs/promises';
import type { StateExport, StateStream } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { ForkPointReply } from '../../engine/ports/fork.js';
import type { InjectPort } from '../../engine/ports/inject.js';
import type { ImageCaptureHandle } from '../../native/types.js';

/** The parent's device state, which is below a megabyte: a limit against a VM that has lost its mind. */
const STATE_BYTES_MAX = 1024 * 1024 * 1024;

export interface ForkPointOptions {
  /** The parent's. */
  readonly state: StateExport;
  /** null: the parent stays stopped, and its memory files are the image. */
  readonly capture: ImageCaptureHandle | null;
  /**
   * Clones are about to begin, and copying what nobody has asked for would take their processors; the caller sees to it
   * afterwards.
   */
  readonly isSweepLater: boolean;
  readonly statePath: string;
  /** Makes the disks' present files read-only for all. Called while the parent stands still. */
  readonly snapshotDisks: () => Promise<void>;
  readonly inject: InjectPort;
}

/** If it rejects the parent may stand still: the caller lets it run on. */
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
    if (bytes > STATE_BYTES_MAX) throw new MigrationError('QEMU_FAILED', 'the device state does not end');
  }
  return bytes;
}

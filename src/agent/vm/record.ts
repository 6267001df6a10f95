/**
 * The record of a VM, by which a restarted daemon finds the VM again: one JSON file in the VM's directory. After
 * `writeRecord` has resolved, the new record survives a crash of the machine.
 */

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { Accel, DiskSpec, NicSpec, VmExit, VmSpec, VmState } from '../../domain/vm.js';
import { writeDurably, writeWhole } from '../../durable/durable-file.js';
import { unreadable } from '../../durable/record-files.js';
import { checkVersion, seal, unseal } from '../../durable/sealed.js';
import { VM_RECORD_FILE } from '../../durable/state-format.js';
import type { ProcessIdentity } from '../../kit/process.js';
import { parseKept } from '../../kit/unknown-keys.js';
import type { RegionFile, VmMemorySnapshot } from '../../native/types.js';
import { nicSpecSchema, vmSpecSchema } from '../../schemas/vm-spec.js';
import { accel, diskFormat, vmState } from '../../schemas/words.js';

const VERSION = 1;

/** The steps that a clone still needs when it runs (settle-in.ts). */
export interface IdentityDue {
  /** The NICs that the clone is to have. */
  readonly nics: readonly NicSpec[];
  /** The error of the last attempt. */
  readonly failure: string | null;
}

export interface VmRecord {
  readonly version: 1;
  readonly spec: VmSpec;
  readonly state: VmState;
  readonly epoch: number;
  readonly accel: Accel;
  readonly qemuVersion: string;
  /** The session that made this VM a target. It stays set when the VM runs. */
  readonly session: string | null;
  readonly job: string | null;
  readonly process: ProcessIdentity | null;
  /** The image whose files are the clone's memory. Null for any other VM. */
  readonly image: string | null;
  /** Empty for private memory. */
  readonly regions: readonly RegionFile[];
  readonly memory: VmMemorySnapshot | null;
  /** Tap devices by NIC id. */
  readonly taps: Readonly<Record<string, string>>;
  /** Null if the VM has its own identity. */
  readonly identityDue: IdentityDue | null;
  readonly exit: VmExit | null;
  /** The exit code that the guest had written to its exit port before the VM moved here. */
  readonly exitCodeBefore: number | null;
  readonly createdAt: string;
  /** The user that the process runs as, and the group. Absent: the daemon's own. */
  readonly qemuUid?: number;
  /** The mount namespace of the contained process, as the kernel names it. Known when the process has started. */
  readonly mountNamespace?: string;
  /** Overlays of the VM's disks are being merged. No job may have the VM, and a restarted daemon ends the merge. */
  readonly isMerging?: boolean;
  /** Set before the merge of this overlay begins, and until its file is gone or the merge has been given up. */
  readonly mergedOverlay?: MergedOverlay | null;
  /** Why the VM stands still for good: its memory is not what its image was. Absent: it is whole. */
  readonly damage?: string;
}

/** An overlay of a disk of the VM, and the file that it is merged into. */
export interface MergedOverlay {
  /** The id of the disk. */
  readonly id: string;
  readonly path: string;
  readonly base: Pick<DiskSpec, 'path' | 'format'>;
}

/** Changes of a record that describe what is already the case. */
export type RecordAmendment = Pick<
  Partial<VmRecord>,
  'spec' | 'image' | 'exit' | 'exitCodeBefore' | 'isMerging' | 'mergedOverlay'
>;

const count = z.int().min(0);
const bigCount = z
  .string()
  .regex(/^\d{1,20}$/)
  .transform(BigInt);
const session = z.string().max(256).nullable();

const recordSchema = z.strictObject({
  version: z.literal(VERSION),
  spec: vmSpecSchema,
  state: vmState,
  epoch: count,
  accel,
  qemuVersion: z.string(),
  session,
  job: session,
  process: z
    .strictObject({ pid: z.int().min(2), startTicks: z.string().regex(/^\d+$/), bootId: z.string() })
    .nullable(),
  image: z
    .string()
    .regex(/^[0-9a-f]{16}$/)
    .nullable()
    .default(null),
  regions: z.array(
    z.strictObject({
      path: z.string(),
      lengthBytes: bigCount,
      pageBytes: count,
      isPrivate: z.boolean().exactOptional(),
    }),
  ),
  memory: z
    .strictObject({
      state: z.enum(['waiting', 'attached', 'complete', 'gone', 'refused']),
      pid: count,
      descriptors: z.array(z.strictObject({ numberInVm: count, kind: count })),
      ranges: z.array(
        z.strictObject({
          regionIndex: count,
          regionOffsetBytes: bigCount,
          lengthBytes: bigCount,
          base: bigCount,
          descriptorIndex: count,
        }),
      ),
      failure: z.strictObject({ code: z.int(), errno: z.int(), what: z.string() }).nullable().exactOptional(),
    })
    .nullable(),
  taps: z.record(z.string(), z.string()),
  identityDue: z
    .strictObject({ nics: z.array(nicSpecSchema), failure: z.string().nullable() })
    .nullable()
    .default(null),
  exit: z
    .strictObject({
      at: z.string(),
      reason: z.string(),
      code: z.int().nullable(),
      signal: z.string().nullable(),
      exitCode: z.int().nullable().default(null),
    })
    .nullable(),
  exitCodeBefore: z.int().min(0).max(255).nullable().default(null),
  createdAt: z.string(),
  qemuUid: z.int().min(1).exactOptional(),
  mountNamespace: z.string().max(64).exactOptional(),
  isMerging: z.boolean().exactOptional(),
  mergedOverlay: z
    .strictObject({ id: z.string(), path: z.string(), base: z.strictObject({ path: z.string(), format: diskFormat }) })
    .nullable()
    .exactOptional(),
  damage: z.string().exactOptional(),
});

/**
 * Returns the state to record when a caller sets `state`. If QEMU has exited, the state is `stopped`, even if the
 * caller says `running`: the caller may not know of the exit yet.
 */
export function effectiveState({ process, exit }: VmRecord, state: VmState): VmState {
  return state === 'running' && process === null && exit !== null ? 'stopped' : state;
}

/**
 * Returns the change that reserves the VM, or null if the job has it already. Throws VM_BUSY if another job has it, or
 * while its disks are merged.
 */
export function reservedBy(record: VmRecord, job: string): Partial<VmRecord> | null {
  const { spec, job: holder } = record;
  if (holder === job) return null;
  if (isMerging(record)) throw mergesDisks(spec.name);
  refuseIfDamaged(record);
  if (holder === null) return { job };
  throw new MigrationError('VM_BUSY', `${spec.name} is part of job ${holder}`);
}

export function refuseIfDamaged({ spec, damage }: Pick<VmRecord, 'spec' | 'damage'>): void {
  if (damage === undefined) return;
  throw new MigrationError('DAMAGED', `${spec.name} stands still for good, because its memory is damaged: ${damage}`, {
    remedy: `"vmctl stop ${spec.name}" ends it`,
  });
}

export function isMerging({ isMerging, mergedOverlay }: VmRecord): boolean {
  return isMerging === true || (mergedOverlay !== undefined && mergedOverlay !== null);
}

export function mergesDisks(name: string): MigrationError {
  return new MigrationError('VM_BUSY', `overlays of the disks of ${name} are being merged`, {
    remedy:
      'wait until "vmctl flatten" or "vmctl image rm" has ended, then try again; ' +
      'if it lasts, the log of vmigrated says why',
  });
}

export function withDisks(
  { spec }: VmRecord,
  fileOf: (disk: DiskSpec) => Pick<DiskSpec, 'path' | 'format'>,
): Pick<VmRecord, 'spec'> {
  const disks = spec.disks.map((disk) => {
    const { path, format } = fileOf(disk);
    return { ...disk, path, format };
  });
  return { spec: { ...spec, disks } };
}

export async function writeRecord(directory: string, record: VmRecord): Promise<void> {
  const path = join(directory, VM_RECORD_FILE);
  // A clone that waits for its image does not survive a crash of the machine, and neither does the image. So the record
  // of a waiting clone need not survive it either.
  const isWaiting = record.image !== null && record.state === 'incoming';
  await (isWaiting ? writeWhole : writeDurably)(path, seal(record));
}

/**
 * Returns null if there is no record: a crash came before the first write, or lost the record of a waiting clone.
 * Throws
 * CORRUPT if the file is not a valid record.
 */
export async function readRecord(directory: string): Promise<VmRecord | null> {
  const path = join(directory, VM_RECORD_FILE);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw unreadable(`${path} cannot be read`, error);
  }
  if (text === '') return null;
  try {
    const json = unseal(text, path);
    checkVersion(json, VERSION, path);
    return parseKept(recordSchema, json);
  } catch (error) {
    throw unreadable(`${path} is not a VM record`, error);
  }
}

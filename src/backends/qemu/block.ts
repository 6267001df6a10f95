/**
 * QEMU's block graph, as far as forks use it. This file checks the answers itself instead of using types generated from
 * QEMU's schema, where one of these commands alone has more members than all others together.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { OpenFile } from '../../domain/storage.js';
import type { AtSwitch } from '../vm-disks.js';
import type { QmpClient } from './qmp/client.js';

const ABANDON_TIMEOUT_MS = 10_000;
const CLOSE_TIMEOUT_MS = 2_000;
const POLL_MS = 20;
/** Begins the name of a node that QEMU has made by itself. It goes with the node above it. */
const OWN_NODE = '#';
/** How often a merge is asked for its progress. */
const PROGRESS_POLL_MS = 5_000;
/** How long the switch to the base may take. The VM is paused meanwhile, and both files have the same content. */
const SWITCH_MS = 10_000;
/** The longest time that a timer can have. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;
/** A VM has one merge at a time. No name of a node is part of it: those that QEMU gives are not allowed in it. */
const MERGE_JOB = 'merge-overlay';

const DESCRIBED = 'json:';
const described: z.ZodType<string> = z.union([
  z.object({ filename: z.string() }).transform(({ filename }) => filename),
  z.object({ file: z.lazy(() => described) }).transform(({ file }) => file),
]);

/**
 * QEMU names a node by its file, or by a description of its own if the node was opened otherwise than its file says: an
 * overlay before the switch has no backing file. The file is in there.
 */
const filePath = z.string().transform((name) => {
  if (!name.startsWith(DESCRIBED)) return name;
  try {
    return described.parse(JSON.parse(name.slice(DESCRIBED.length)));
  } catch {
    // A long description is cut off.
    return name;
  }
});

interface ImageInfo {
  readonly filename: string;
  readonly 'backing-image'?: ImageInfo | undefined;
}

const imageInfo: z.ZodType<ImageInfo> = z.object({
  filename: filePath,
  'backing-image': z.lazy(() => imageInfo).optional(),
});

const blockList = z.array(
  z.object({
    qdev: z.string().optional(),
    inserted: z
      .object({
        'node-name': z.string(),
        file: filePath,
        ro: z.boolean(),
        image: imageInfo,
      })
      .optional(),
  }),
);

const nodeList = z.array(
  z.object({
    ...{ 'node-name': z.string().optional(), drv: z.string(), file: filePath, ro: z.boolean().optional() },
    cache: z.object({ direct: z.boolean() }).optional(),
  }),
);
/** Drivers of nodes that are files or block devices of the host. */
const FILE_DRIVERS: ReadonlySet<string> = new Set(['file', 'host_device', 'host_cdrom']);

/** The node that a disk of the guest reads and writes now. */
export interface ActiveNode {
  readonly node: string;
  /** The path by which QEMU opened the file. */
  readonly path: string;
  readonly isReadOnly: boolean;
}

/** Returns the nodes by the device's id. A device without an id in the spec is listed by its path in QEMU. */
export async function activeNodes(qmp: QmpClient): Promise<Map<string, ActiveNode>> {
  const blocks = blockList.parse(await qmp.executeUntyped('query-block'));
  const nodes = new Map<string, ActiveNode>();
  for (const [index, { qdev, inserted }] of blocks.entries()) {
    if (inserted === undefined) continue;
    const id = /\/peripheral\/([^/]+)/.exec(qdev ?? '')?.[1] ?? qdev ?? `drive ${index}`;
    nodes.set(id, { node: inserted['node-name'], path: inserted.file, isReadOnly: inserted.ro });
  }
  return nodes;
}

/** Returns the files that all drives use, with the files behind them. */
export async function openFiles(qmp: QmpClient): Promise<OpenFile[]> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  const files = nodes.filter(({ drv }) => FILE_DRIVERS.has(drv));
  return files.map(({ file, ro }) => ({ path: file, isReadOnly: ro === true }));
}

/** Returns the names of the nodes whose reads go past the host's page cache. */
export async function directNodes(qmp: QmpClient): Promise<string[]> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  return nodes.filter(({ cache }) => cache?.direct === true).map((node) => node['node-name'] ?? node.drv);
}

const errorList = z.array(z.object({ 'io-status': z.string().optional() }));

/** True if the VM has stopped because there is no space for what it writes. */
export async function isAnyDiskFull(qmp: QmpClient): Promise<boolean> {
  const blocks = errorList.parse(await qmp.executeUntyped('query-block'));
  return blocks.some((block) => block['io-status'] === 'nospace');
}

/** Returns the files that the disks read and write now: of each disk the whole chain. */
export async function filesInUse(qmp: QmpClient): Promise<ReadonlySet<string>> {
  const files = new Set<string>();
  for (const { inserted } of blockList.parse(await qmp.executeUntyped('query-block'))) {
    for (let image = inserted?.image; image !== undefined; image = image['backing-image']) files.add(image.filename);
  }
  return files;
}

/** Returns the format node on this file, or null if QEMU has not opened the file. */
export async function nodeOfFile(qmp: QmpClient, path: string): Promise<string | null> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  return nodes.find((node) => node.file === path && !FILE_DRIVERS.has(node.drv))?.['node-name'] ?? null;
}

/**
 * Closes all nodes on this file, which no disk may use. Throws CONFLICT if QEMU does not close the file, QEMU_FAILED if
 * a node is in use.
 */
export async function closeFile(qmp: QmpClient, path: string): Promise<void> {
  const nodesOf = async () => {
    const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
    return nodes.filter(({ file }) => file === path);
  };
  // A node on the file itself is in use as long as there is a format on it.
  for (const isFile of [false, true]) {
    for (const { drv, 'node-name': node = '' } of await nodesOf()) {
      if (FILE_DRIVERS.has(drv) === isFile && !node.startsWith(OWN_NODE)) await closeNode(qmp, node);
    }
  }
  const deadlineMs = performance.now() + CLOSE_TIMEOUT_MS;
  while ((await nodesOf()).length > 0) {
    if (performance.now() > deadlineMs) throw new MigrationError('CONFLICT', `QEMU does not close ${path}`);
    await sleep(POLL_MS);
  }
}

/** Opens a qcow2 overlay. Its backing file is not opened: switchToOverlays attaches the disk's current node. */
export async function openOverlay(qmp: QmpClient, node: string, path: string): Promise<void> {
  await qmp.executeUntyped('blockdev-add', {
    driver: 'qcow2',
    'node-name': node,
    file: { driver: 'file', filename: path },
    backing: null,
  });
}

/** Closes a node, if it exists. Throws QEMU_FAILED if a disk uses it. */
export async function closeNode(qmp: QmpClient, node: string): Promise<void> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  if (!nodes.some((known) => known['node-name'] === node)) return;
  await qmp.executeUntyped('blockdev-del', { 'node-name': node });
}

/** Switches all disks to their overlays at one moment, or none. */
export async function switchToOverlays(
  qmp: QmpClient,
  switches: readonly { readonly node: string; readonly overlay: string }[],
): Promise<void> {
  const actions = switches.map((data) => ({ type: 'blockdev-snapshot', data }));
  await qmp.executeUntyped('transaction', { actions });
}

const jobList = z.array(z.object({ device: z.string(), type: z.string(), offset: z.number() }));

/** Returns the jobs that read or write disks now, of this program and of others. */
export async function blockJobs(qmp: QmpClient): Promise<{ readonly id: string; readonly type: string }[]> {
  const jobs = jobList.parse(await qmp.executeUntyped('query-block-jobs'));
  return jobs.map(({ device, type }) => ({ id: device, type }));
}

/**
 * Cancels the merge that this daemon or an earlier one has begun. The disk stays as it is: one that still uses its
 * overlay has all of its content there. Throws TIMEOUT if QEMU does not end it.
 */
export async function abandonMerges(qmp: QmpClient): Promise<void> {
  const deadlineMs = performance.now() + ABANDON_TIMEOUT_MS;
  if ((await mergeOffset(qmp)) === null) return;
  // It may have ended meanwhile.
  await qmp.executeUntyped('block-job-cancel', { device: MERGE_JOB, force: true }).catch(() => undefined);
  while ((await mergeOffset(qmp)) !== null) {
    if (performance.now() > deadlineMs) throw new MigrationError('TIMEOUT', 'QEMU does not end the merge of a disk');
    await sleep(POLL_MS);
  }
}

/** Returns how far the merge is, or null if none is in progress. */
async function mergeOffset(qmp: QmpClient): Promise<number | null> {
  const jobs = jobList.parse(await qmp.executeUntyped('query-block-jobs'));
  return jobs.find(({ device }) => device === MERGE_JOB)?.offset ?? null;
}

export interface Merge {
  /** The node that the disk uses. */
  readonly root: string;
  readonly top: string;
  readonly base: string;
  /** How long the merge may make no progress. */
  readonly stalledMs: number;
}

/**
 * Merges the overlay `top` into `base` and removes `top` from the chain. The VM may run meanwhile. If the disk uses the
 * overlay itself, `atSwitch` is called when both have the same content. It calls `complete`, after which the disk uses
 * the base. If `atSwitch` throws before that, the disk stays on the overlay. A merge takes as long as it makes progress.
 *
 * If it rejects, it has tried to cancel the merge. The caller finds out what the disk uses.
 */
export async function mergeDown(
  qmp: QmpClient,
  { root, top, base, stalledMs }: Merge,
  atSwitch: AtSwitch,
): Promise<void> {
  await abandonMerges(qmp);
  const isActive = root === top;
  const ended = new AbortController();
  const concluded = (name: string) =>
    qmp.waitForEvent(name, {
      timeoutMs: LONGEST_TIMER_MS,
      signal: ended.signal,
      filter: ({ data }) => data['device'] === MERGE_JOB,
    });
  const over = concluded('BLOCK_JOB_COMPLETED').then(({ data: { error } }) => {
    if (typeof error !== 'string') return;
    throw new MigrationError('QEMU_FAILED', `overlay ${top} cannot be merged into ${base}: ${error}`);
  });
  // A job that fails does not become ready.
  const merged = isActive ? Promise.race([concluded('BLOCK_JOB_READY'), over]) : over;
  for (const each of [over, merged]) each.catch(() => undefined);
  try {
    await qmp.executeUntyped('block-commit', {
      'job-id': MERGE_JOB,
      device: root,
      ...(isActive ? {} : { 'top-node': top }),
      'base-node': base,
    });
    await Promise.race([merged, rejectOnStall(qmp, stalledMs, ended.signal)]);
    if (!isActive) return;
    await atSwitch(async () => {
      await qmp.executeUntyped('job-complete', { id: MERGE_JOB });
      await Promise.race([over, rejectAfter(SWITCH_MS, ended.signal)]);
    });
  } catch (error) {
    await abandonMerges(qmp).catch(() => undefined);
    throw error;
  } finally {
    ended.abort();
  }
}

/** Rejects if the merge makes no progress for so long. Never settles once `signal` has aborted. */
async function rejectOnStall(qmp: QmpClient, stalledMs: number, signal: AbortSignal): Promise<never> {
  let offset: number | null = null;
  let advancedAtMs = performance.now();
  for (;;) {
    await sleep(Math.min(PROGRESS_POLL_MS, stalledMs / 4), undefined, { signal }).catch(() => undefined);
    if (signal.aborted) return new Promise(() => undefined);
    // A QEMU that does not answer makes no progress.
    const now = await mergeOffset(qmp).catch(() => offset);
    if (now !== offset) [offset, advancedAtMs] = [now, performance.now()];
    else if (performance.now() - advancedAtMs > stalledMs) {
      throw new MigrationError(
        'TIMEOUT',
        `the merge of a disk has made no progress for ${Math.round(stalledMs / 1000)} s`,
      );
    }
  }
}

async function rejectAfter(limitMs: number, signal: AbortSignal): Promise<never> {
  await sleep(limitMs, undefined, { signal }).catch(() => undefined);
  if (signal.aborted) return new Promise(() => undefined);
  throw new MigrationError('TIMEOUT', `QEMU has not switched a disk to its base within ${limitMs / 1000} s`);
}

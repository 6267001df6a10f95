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

const JOB_TIMEOUT_MS = 3600_000;
const ABANDON_TIMEOUT_MS = 10_000;
const ABANDON_POLL_MS = 20;
const MERGE_JOB_PREFIX = 'merge-';

const blockList = z.array(
  z.object({
    qdev: z.string().optional(),
    inserted: z
      .object({
        'node-name': z.string(),
        file: z.string(),
        ro: z.boolean(),
      })
      .optional(),
  }),
);

const nodeList = z.array(
  z.object({ 'node-name': z.string().optional(), drv: z.string(), file: z.string(), ro: z.boolean().optional() }),
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

/** Returns the format node on this file, or null if QEMU has not opened the file. */
export async function nodeOfFile(qmp: QmpClient, path: string): Promise<string | null> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  return nodes.find((node) => node.file === path && node.drv !== 'file')?.['node-name'] ?? null;
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

const jobList = z.array(z.object({ device: z.string(), type: z.string() }));

/** Returns the jobs that read or write disks now, of this program and of others. */
export async function blockJobs(qmp: QmpClient): Promise<{ readonly id: string; readonly type: string }[]> {
  const jobs = jobList.parse(await qmp.executeUntyped('query-block-jobs'));
  return jobs.map(({ device, type }) => ({ id: device, type }));
}

/**
 * Cancels the merges that an earlier daemon has begun. Each disk stays as it is: one that still uses its overlay has
 * all of its content there. Throws TIMEOUT if QEMU does not end them.
 */
export async function abandonMerges(qmp: QmpClient): Promise<void> {
  const isMerge = ({ id }: { readonly id: string }): boolean => id.startsWith(MERGE_JOB_PREFIX);
  const deadlineMs = performance.now() + ABANDON_TIMEOUT_MS;
  for (const { id } of (await blockJobs(qmp)).filter(isMerge)) {
    // It may have ended meanwhile.
    await qmp.executeUntyped('block-job-cancel', { device: id, force: true }).catch(() => undefined);
  }
  while ((await blockJobs(qmp)).some(isMerge)) {
    if (performance.now() > deadlineMs) throw new MigrationError('TIMEOUT', 'QEMU does not end the merge of a disk');
    await sleep(ABANDON_POLL_MS);
  }
}

export interface Merge {
  /** The node that the disk uses. */
  readonly root: string;
  readonly top: string;
  readonly base: string;
}

/**
 * Merges the overlay `top` into `base` and removes `top` from the chain. The VM may run meanwhile. If the disk uses the
 * overlay itself, `atSwitch` is called when both have the same content. It calls `complete`, after which the disk uses
 * the base. If `atSwitch` throws before that, the disk stays on the overlay.
 */
export async function mergeDown(qmp: QmpClient, { root, top, base }: Merge, atSwitch: AtSwitch): Promise<void> {
  await abandonMerges(qmp);
  const job = `${MERGE_JOB_PREFIX}${top}`;
  const isActive = root === top;
  const concluded = (name: string) =>
    qmp.waitForEvent(name, { timeoutMs: JOB_TIMEOUT_MS, filter: ({ data }) => data['device'] === job });
  const ready = isActive ? concluded('BLOCK_JOB_READY') : null;
  const over = concluded('BLOCK_JOB_COMPLETED');
  over.catch(() => undefined);
  ready?.catch(() => undefined);
  await qmp.executeUntyped('block-commit', {
    'job-id': job,
    device: root,
    ...(isActive ? {} : { 'top-node': top }),
    'base-node': base,
  });
  const concluding = async (): Promise<void> => {
    const { error } = (await over).data;
    if (typeof error === 'string')
      throw new MigrationError('QEMU_FAILED', `overlay ${top} cannot be merged into ${base}: ${error}`);
  };
  if (ready === null) return concluding();
  // A job that fails does not become ready.
  await Promise.race([ready, over.then(concluding)]);
  try {
    await atSwitch(async () => {
      await qmp.executeUntyped('job-complete', { id: job });
      await concluding();
    });
  } catch (error) {
    await abandonMerges(qmp).catch(() => undefined);
    throw error;
  }
}

/**
 * QEMU's block graph, as far as forks use it. This file checks the answers itself instead of using types generated from
 * QEMU's schema, where one of these commands alone has more members than all others together.
 */
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { OpenFile } from '../../domain/storage.js';
import type { QmpClient } from './qmp/client.js';

const JOB_TIMEOUT_MS = 3600_000;

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

/** Merges the overlay `top` into `base` and removes `top` from the chain. The VM may run meanwhile. */
export async function mergeDown(qmp: QmpClient, root: string, top: string, base: string): Promise<void> {
  const job = `merge-${top}`;
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
  if (ready !== null) {
    await Promise.race([ready, over]);
    await qmp.executeUntyped('job-complete', { id: job });
  }
  const { error } = (await over).data;
  if (typeof error === 'string')
    throw new MigrationError('QEMU_FAILED', `overlay ${top} cannot be merged into ${base}: ${error}`);
}

/**
 * QEMU's block graph as forks use it. The answers are checked here and not typed from QEMU's schema, where one of these
 * commands alone has more members than all others together.
 */
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
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

const nodeList = z.array(z.object({ 'node-name': z.string().optional(), drv: z.string(), file: z.string() }));

/** What a disk of the guest reads and writes now. */
export interface ActiveNode {
  readonly node: string;
  /** As QEMU opened it. */
  readonly path: string;
  readonly isReadOnly: boolean;
}

/** By the device's id; one that the spec does not name by QEMU's path of it. */
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

/** The node that speaks a disk's format on this file; null if QEMU has not opened it. */
export async function nodeOfFile(qmp: QmpClient, path: string): Promise<string | null> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  return nodes.find((node) => node.file === path && node.drv !== 'file')?.['node-name'] ?? null;
}

/** Opens a qcow2 that is to lie on what a disk reads now. */
export async function openOverlay(qmp: QmpClient, node: string, path: string): Promise<void> {
  await qmp.executeUntyped('blockdev-add', {
    driver: 'qcow2',
    'node-name': node,
    file: { driver: 'file', filename: path },
    backing: null,
  });
}

/** Nothing happens if there is no such node. QEMU_FAILED if a disk uses it. */
export async function closeNode(qmp: QmpClient, node: string): Promise<void> {
  const nodes = nodeList.parse(await qmp.executeUntyped('query-named-block-nodes', { flat: true }));
  if (!nodes.some((known) => known['node-name'] === node)) return;
  await qmp.executeUntyped('blockdev-del', { 'node-name': node });
}

/** Every disk goes on in its overlay, all at one moment, or none. */
export async function switchToOverlays(
  qmp: QmpClient,
  switches: readonly { readonly node: string; readonly overlay: string }[],
): Promise<void> {
  const actions = switches.map((data) => ({ type: 'blockdev-snapshot', data }));
  await qmp.executeUntyped('transaction', { actions });
}

/** What stands in the overlay `top` goes into what it lies on, and `top` leaves the chain. The VM runs on meanwhile. */
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
  if (typeof error === 'string') throw new MigrationError('QEMU_FAILED', `an overlay cannot be merged: ${error}`);
}

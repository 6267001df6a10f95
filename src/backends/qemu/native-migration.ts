/**
 * QEMU's own migration, pre-copy or post-copy, for VMs whose RAM the pager does not move. This file only controls it.
 * The target's QEMU was started with -S, so the guest does not run there before the owner has changed.
 */

import { MigrationError } from '../../domain/errors.js';
import type { NativeMoveOrder } from '../backend.js';
import { configureIncoming, configureOutgoing } from './migration.js';
import { MigrationWatch } from './migration-watch.js';
import type { QmpClient } from './qmp/client.js';

/** Longer than any migration. The job's deadlines or its cancel end it sooner. */
const MOVE_TIMEOUT_MS = 24 * 3600 * 1000;
const CANCEL_TIMEOUT_MS = 5_000;

/** Makes QEMU listen on a free port of `address` and returns the URI. */
export async function incomingUri(qmp: QmpClient, isPostcopy: boolean, address: string): Promise<string> {
  const host = address.includes(':') ? `[${address}]` : address;
  await configureIncoming(qmp, ['events', 'late-block-activate', ...(isPostcopy ? (['postcopy-ram'] as const) : [])]);
  await qmp.execute('migrate-incoming', { uri: `tcp:${host}:0` });
  const listening = (await qmp.execute('query-migrate'))['socket-address']?.[0];
  if (listening?.type !== 'inet')
    throw new MigrationError('QEMU_FAILED', 'query-migrate has no socket-address of the incoming migration');
  return `tcp:${host}:${listening.port}`;
}

/** See VmProcess. */
export async function nativeMove(qmp: QmpClient, order: NativeMoveOrder): Promise<void> {
  const { uri, isPostcopy } = order;
  if (!/^tcp:(\[[0-9a-f:.]+\]|[0-9.]+):\d{1,5}$/i.test(uri)) {
    throw new MigrationError('PEER_PROTOCOL', 'the migration URI of the target is not tcp:ADDRESS:PORT');
  }
  await configureOutgoing(qmp, ['events', ...(isPostcopy ? (['postcopy-ram'] as const) : [])], order);
  const watch = new MigrationWatch(qmp);
  try {
    await qmp.execute('migrate', { uri });
    if (isPostcopy) {
      await watch.reached('active', MOVE_TIMEOUT_MS);
      await qmp.execute('migrate-start-postcopy');
      await watch.reached('postcopy-active', MOVE_TIMEOUT_MS);
    } else {
      await watch.reached('completed', MOVE_TIMEOUT_MS);
    }
  } finally {
    watch.end();
  }
}

/** Between hosts no text of a reading is longer (src/api/peers/schemas.ts). */
const ERROR_TEXT_MAX = 1024;

/** Returns the progress. The keys are those of SourcePort.nativeProgress. */
export async function nativeReading(qmp: QmpClient): Promise<Readonly<Record<string, number | string>>> {
  const { status, ram, downtime, 'error-desc': errorText } = await qmp.execute('query-migrate');
  return {
    ...(status === undefined ? {} : { status }),
    ...(errorText === undefined ? {} : { errorText: errorText.slice(0, ERROR_TEXT_MAX) }),
    ...(downtime === undefined ? {} : { downtimeMs: downtime }),
    ...(ram === undefined
      ? {}
      : {
          ramTotalBytes: ram.total,
          ramTransferredBytes: ram.transferred,
          ramRemainingBytes: ram.remaining,
          bytesPerS: Math.round((ram.mbps * 1e6) / 8),
          rounds: ram['dirty-sync-count'],
          postcopyRequests: ram['postcopy-requests'],
        }),
  };
}

/** Cancels any migration of this QEMU that can still be cancelled. Does nothing if there is none. Idempotent. */
export async function cancelMigration(qmp: QmpClient): Promise<void> {
  // The watch starts before the query, because the end of the migration may arrive together with the answer.
  const watch = new MigrationWatch(qmp);
  try {
    const { status } = await qmp.execute('query-migrate');
    if (status === undefined || ['none', 'completed', 'failed', 'cancelled'].includes(status)) return;
    await qmp.execute('migrate_cancel');
    await watch.over(CANCEL_TIMEOUT_MS);
  } finally {
    watch.end();
  }
}

/** Cancels the VM's migration and resumes the VM. The caller has made sure that the VM may run on this host. */
export async function cancelAndRun(qmp: QmpClient): Promise<void> {
  await cancelMigration(qmp);
  const { running } = await qmp.execute('query-status');
  if (!running) await qmp.execute('cont');
}

/**
 * QEMU's own migration, pre-copy or post-copy, for VMs whose RAM the pager does not move. This file only controls it.
 * The target's QEMU was started with -S, so the guest does not run there before the owner has changed.
 */

import { once } from 'node:events';
import { createServer, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
import { joinStreams } from '../../kit/join-streams.js';
import { connectUnix, listenUnix } from '../../kit/unix-socket.js';
import type { NativeMoveOrder, OpenStream } from '../backend.js';
import type { QemuConnection } from './connection.js';
import { configureOutgoing } from './migration.js';
import { MigrationWatch } from './migration-watch.js';
import type { QmpClient } from './qmp/client.js';

/** Longer than any migration. The job's deadlines or its cancel end it sooner. */
const MOVE_TIMEOUT_MS = 24 * 3600 * 1000;
const CANCEL_TIMEOUT_MS = 5_000;
/** Less than the time in which the caller of a tunnel gives up (src/api/peers/tunnel.ts). */
const RECOVER_TIMEOUT_MS = 10_000;
const RECOVER_POLL_MS = 50;

/** See VmProcess. */
export async function nativeMove(connection: QemuConnection, order: NativeMoveOrder): Promise<void> {
  const { qmp } = connection;
  const { isPostcopy } = order;
  await configureOutgoing(qmp, ['events', ...(isPostcopy ? (['postcopy-ram'] as const) : [])], order);
  await throughTunnel(connection, order.open, async (uri, watch) => {
    // Whoever cancels asks QEMU afterwards, and so finds this migration, or it does not begin.
    order.signal.throwIfAborted();
    await qmp.execute('migrate', { uri });
    if (isPostcopy) {
      await watch.reached('active', MOVE_TIMEOUT_MS);
      await qmp.execute('migrate-start-postcopy');
      await watch.reached('postcopy-active', MOVE_TIMEOUT_MS);
    } else {
      await watch.reached('completed', MOVE_TIMEOUT_MS);
    }
  });
}

/** See VmProcess. */
export async function nativeRecover(connection: QemuConnection, open: OpenStream): Promise<void> {
  const qmp = await connection.connected();
  await throughTunnel(connection, open, async (uri, watch) => {
    await whilePausing(qmp, () => qmp.execute('migrate', { uri, resume: true }));
    await watch.reached('postcopy-active', RECOVER_TIMEOUT_MS);
  });
}

/** Waits again for the source's stream, after a loss in the post-copy phase, and connects to where QEMU waits. */
export async function reopenStream(qmp: QmpClient, path: string): Promise<Duplex> {
  return whilePausing(qmp, async () => {
    try {
      await qmp.execute('migrate-recover', { uri: `unix:${path}` }, { isOutOfBand: true });
    } catch (error) {
      // It may wait already, for a connection of an earlier attempt that never came.
      return connectHalfOpen(path).catch(() => {
        throw error;
      });
    }
    return connectHalfOpen(path);
  });
}

/**
 * Repeats `attempt`, which needs a post-copy that is paused, until it works. This QEMU may not have seen the loss: a
 * network that drops everything says nothing. The command goes out of band, because QEMU's main loop may wait for a
 * page.
 */
async function whilePausing<T>(qmp: QmpClient, attempt: () => Promise<T>): Promise<T> {
  await qmp.execute('migrate-pause', {}, { isOutOfBand: true }).catch(() => undefined);
  const deadlineMs = performance.now() + RECOVER_TIMEOUT_MS;
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (performance.now() > deadlineMs) throw error;
    }
    await sleep(RECOVER_POLL_MS);
  }
}

/** Each end may be the first that has nothing more to say. Throws CONFLICT if QEMU does not wait there. */
export async function connectHalfOpen(path: string): Promise<Socket> {
  const socket = connectUnix(path, { allowHalfOpen: true });
  try {
    await once(socket, 'connect');
  } catch (cause) {
    throw new MigrationError('CONFLICT', 'QEMU does not wait for a stream, or has one', { cause });
  }
  return socket;
}

/**
 * Makes a socket to which QEMU connects once, and whose bytes go to the target by a tunnel between the daemons. QEMU
 * itself neither listens at a port nor connects to one. If the call succeeds, the tunnel outlives it, until one of its
 * ends closes.
 */
async function throughTunnel(
  connection: QemuConnection,
  open: OpenStream,
  begin: (uri: string, watch: MigrationWatch) => Promise<void>,
): Promise<void> {
  const path = connection.sockets.stateOut;
  const tunnel = await open();
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    server.close();
    joinStreams(socket, tunnel);
  });
  server.maxConnections = 1;
  const watch = new MigrationWatch(connection.qmp);
  try {
    await listenUnix(server, path);
    await begin(`unix:${path}`, watch);
  } catch (error) {
    // QEMU learns of it, and is then as it was before.
    tunnel.destroy();
    throw error;
  } finally {
    watch.end();
    server.close();
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

/**
 * Gives a running clone NICs of its own. Each NIC with the parent's address is unplugged, with the guest's consent. A
 * NIC with the clone's address is plugged into its place. Only then may its tap join a bridge. So the parent's address
 * is never on a bridge twice, whatever fails.
 *
 * A step that has been done is not repeated, so a restarted daemon may call it again.
 */

import { MigrationError } from '../../domain/errors.js';
import type { NicSpec, VmSpec } from '../../domain/vm.js';
import type { NicOrder } from '../backend.js';
import { nicProperties } from './command-line.js';
import type { QemuConnection } from './connection.js';
import type { QmpClient } from './qmp/client.js';

/** A guest takes some milliseconds. If many guests share a processor, it takes many seconds. */
const UNPLUG_TIMEOUT_MS = 120_000;
const PERIPHERALS = '/machine/peripheral';

/** See VmProcess. */
export async function replaceNics(connection: QemuConnection, order: NicOrder): Promise<void> {
  const { spec, nics } = order;
  const { qmp } = connection;
  await Promise.all(
    nics.map(async (nic, index) => {
      const before = spec.nics[index];
      if (before?.id !== nic.id) throw new MigrationError('INTERNAL', `${spec.name} has no NIC ${nic.id} at ${index}`);
      if (before.mac !== nic.mac || before.type !== nic.type) await replaceNic(qmp, order, nic, index);
    }),
  );
}

async function replaceNic(qmp: QmpClient, order: NicOrder, nic: NicSpec, index: number): Promise<void> {
  const present = await presentMac(qmp, nic);
  if (present !== nic.mac) {
    if (present !== null) await unplug(qmp, order, nic);
    await qmp.executeUntyped('device_add', nicProperties(order.spec, nic, index));
  }
  await order.onPresent(nic);
}

/** Returns the NIC's current address, or null if there is no such device. */
async function presentMac(qmp: QmpClient, nic: NicSpec): Promise<string | null> {
  const devices = await qmp.execute('qom-list', { path: PERIPHERALS });
  if (!devices.some((device) => device.name === nic.id)) return null;
  const mac = await qmp.execute('qom-get', { path: `${PERIPHERALS}/${nic.id}`, property: 'mac' });
  return String(mac).toLowerCase();
}

async function unplug(qmp: QmpClient, order: NicOrder, nic: NicSpec): Promise<void> {
  const { spec, unplugTimeoutMs = UNPLUG_TIMEOUT_MS } = order;
  const waiting = new AbortController();
  const options = {
    timeoutMs: unplugTimeoutMs,
    signal: waiting.signal,
    filter: (event: { data: Readonly<Record<string, unknown>> }) => event.data['device'] === nic.id,
  };
  const deleted = qmp.waitForEvent('DEVICE_DELETED', options);
  const refused = qmp.waitForEvent('DEVICE_UNPLUG_GUEST_ERROR', options).then(() => {
    throw notUnplugged(spec, nic, 'refuses to unplug');
  });
  deleted.catch(() => undefined);
  refused.catch(() => undefined);
  try {
    await qmp.execute('device_del', { id: nic.id });
    await Promise.race([deleted, refused]);
  } catch (error) {
    if (!(error instanceof MigrationError) || error.code !== 'TIMEOUT') throw error;
    throw notUnplugged(spec, nic, `has not unplugged, within ${unplugTimeoutMs} ms,`, error);
  } finally {
    waiting.abort();
  }
}

function notUnplugged({ name }: VmSpec, nic: NicSpec, what: string, cause?: unknown): MigrationError {
  return new MigrationError('TIMEOUT', `${name} has no network: its guest ${what} NIC ${nic.id} of its parent`, {
    remedy: 'load the guest’s driver for PCI hot-plug, or fork with an isolated network or none',
    cause,
  });
}

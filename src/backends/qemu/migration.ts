/** QEMU's migration settings as this project uses them. */
import type { QmpClient } from './qmp/client.js';

/**
 * All capabilities that this project uses. An outgoing migration sets each of them on or off, because a VM that has
 * moved before still has the settings of that move.
 */
const CAPABILITIES = [
  'events',
  'x-ignore-shared',
  'pause-before-switchover',
  'late-block-activate',
  'postcopy-ram',
] as const;

export type Capability = (typeof CAPABILITIES)[number];

/** QEMU accepts any 64-bit number. This one is exact in JSON and in QEMU's arithmetic, and no link is that fast. */
const BANDWIDTH_UNLIMITED = 2 ** 40;
/**
 * QEMU only uses it to decide when to stop the VM. If it cannot send everything but shared RAM within this time, it
 * sends another round first.
 */
const DOWNTIME_MS_DEFAULT = 300;

/**
 * Configures a QEMU that was started to receive. All capabilities are still off, and no limits apply. The command is as
 * short as possible, because QEMU reads its monitor byte by byte, at 4 µs of processor time each, for every clone.
 */
export async function configureIncoming(qmp: QmpClient, capabilities: readonly Capability[]): Promise<void> {
  await qmp.execute('migrate-set-capabilities', {
    capabilities: capabilities.map((capability) => ({ capability, state: true })),
  });
}

/** Configures a QEMU for an outgoing migration. A limit of 0 means no limit. */
export async function configureOutgoing(
  qmp: QmpClient,
  capabilities: readonly Capability[],
  limits: { bandwidthBytesPerS: number; downtimeMsMax: number } = { bandwidthBytesPerS: 0, downtimeMsMax: 0 },
): Promise<void> {
  await qmp.execute('migrate-set-capabilities', {
    capabilities: CAPABILITIES.map((capability) => ({ capability, state: capabilities.includes(capability) })),
  });
  await qmp.execute('migrate-set-parameters', {
    'max-bandwidth': Math.min(limits.bandwidthBytesPerS || BANDWIDTH_UNLIMITED, BANDWIDTH_UNLIMITED),
    'downtime-limit': limits.downtimeMsMax || DOWNTIME_MS_DEFAULT,
  });
}

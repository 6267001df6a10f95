/** QEMU's migration settings as this project uses them. */
import type { QmpClient } from './qmp/client.js';

/**
 * What we ever switch on. Each is set to on or off every time: a VM that has moved before carries the settings of that
 * move.
 */
const CAPABILITIES = [
  'events',
  'x-ignore-shared',
  'pause-before-switchover',
  'late-block-activate',
  'postcopy-ram',
] as const;

export type Capability = (typeof CAPABILITIES)[number];

/** QEMU takes any 64-bit number; this one survives JSON and its own arithmetic, and no link reaches it. */
const BANDWIDTH_UNLIMITED = 2 ** 40;
/**
 * Only how QEMU decides that it may stop: everything but shared RAM is sent within this, else it sends another round
 * before.
 */
const DOWNTIME_MS_DEFAULT = 300;

/**
 * For a QEMU that was started to receive: everything is off still, and of its limits none counts. It says no more than
 * it must: QEMU takes its monitor's input byte by byte, 4 µs of processor time each, for every clone.
 */
export async function configureIncoming(qmp: QmpClient, capabilities: readonly Capability[]): Promise<void> {
  await qmp.execute('migrate-set-capabilities', {
    capabilities: capabilities.map((capability) => ({ capability, state: true })),
  });
}

/** 0 means no limit of ours. */
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

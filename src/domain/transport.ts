/** The terms of transports as types. Their properties are columns of src/transports/table.ts. */
import { TRANSPORT_TABLE, type TransportRow } from '../transports/table.js';

export type Transport = keyof typeof TRANSPORT_TABLE;
export const TRANSPORTS = Object.keys(TRANSPORT_TABLE) as [Transport, ...Transport[]];

/** The table is an argument where a test adds a row. */
export type TransportTable = Readonly<Record<string, TransportRow>>;
export const ALL_TRANSPORTS: TransportTable = TRANSPORT_TABLE;

export function transportRow(transport: Transport, table = ALL_TRANSPORTS): TransportRow {
  return table[transport] ?? TRANSPORT_TABLE[transport];
}

/** Between two processes of one machine. */
export const OWN_MACHINE_TRANSPORT: Transport =
  TRANSPORTS.find((transport) => TRANSPORT_TABLE[transport].sameMachineOnly) ?? TRANSPORTS[0];

export const TRANSPORT_CHOICES = ['auto', ...TRANSPORTS] as const;
export type TransportChoice = (typeof TRANSPORT_CHOICES)[number];

export interface RdmaPort {
  readonly number: number;
  readonly isActive: boolean;
  /** Text for a person. */
  readonly state: string;
  readonly linkLayer: string;
  /** MTU of the path; 0 if the device does not report it. */
  readonly mtuBytes: number;
  readonly gids: readonly string[];
  /** IP addresses of this host that lead to the port. */
  readonly addresses: readonly string[];
}

export interface RdmaDevice {
  readonly name: string;
  readonly isOnDemandPaging: boolean;
  readonly ports: readonly RdmaPort[];
}

export interface RdmaInventory {
  /** Why this host cannot use RDMA now, and the remedy. null: it can, at `address` and `port`. */
  readonly problem: { readonly reason: string; readonly remedy: string } | null;
  readonly devices: readonly RdmaDevice[];
  readonly address: string | null;
  readonly port: number | null;
  /** How much more memory the daemon may lock; null if there is no limit. */
  readonly lockableBytes: number | null;
  /** Free memory in the daemon's cgroup; null if there is no limit. */
  readonly cgroupFreeBytes: number | null;
}

/** The address at which a host's memory can be read by RDMA. */
export interface RdmaPlace {
  readonly host: string;
  readonly port: number;
}

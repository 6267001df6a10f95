/** Schemas of how an image gets from its root to many hosts. */
import { isIP } from 'node:net';
import { z } from 'zod';
import type {
  FanoutPlan,
  HeardProbe,
  HostFanout,
  MulticastGroup,
  NearLevels,
  RoundTrip,
  TopologyFile,
} from '../domain/fanout.js';
import { FANOUT_CHOICES, FANOUTS, MULTICAST_PROVIDERS } from '../domain/fanout.js';
import { hostName } from './words.js';

const HOSTS_MAX = 10_000;
const LEVELS_MAX = 16;
const LEVEL_HOSTS_MAX = 16;
const DATAGRAM_BYTES_MAX = 65_535;
const TOPOLOGY_CHARS_MAX = 512 * 1024;

export const fanout = z.enum(FANOUTS);
export const fanoutChoice = z.enum(FANOUT_CHOICES);
export const multicastProvider = z.enum(MULTICAST_PROVIDERS);

export const topologyFile: z.ZodType<TopologyFile> = z.strictObject({
  name: z.string().min(1).max(4096),
  text: z.string().max(TOPOLOGY_CHARS_MAX),
});

const levels: z.ZodType<NearLevels> = z.array(z.array(hostName).min(1).max(LEVEL_HOSTS_MAX)).max(LEVELS_MAX);
const digestRelays = z.array(hostName).max(LEVELS_MAX);
const datagramBytes = z.int().min(0).max(DATAGRAM_BYTES_MAX);

export const hostFanout: z.ZodType<HostFanout> = z.strictObject({
  kind: fanout,
  levels,
  digestRelays,
  provider: multicastProvider.exactOptional(),
  datagramBytesMax: datagramBytes.exactOptional(),
});

export const fanoutPlan: z.ZodType<FanoutPlan> = z.strictObject({
  kind: fanout,
  reason: z.string().max(1024),
  near: z.array(z.strictObject({ host: hostName, levels, digestRelays })).max(HOSTS_MAX),
  provider: multicastProvider.exactOptional(),
  datagramBytesMax: datagramBytes.exactOptional(),
});

const ipAddress = z.string().refine((text) => isIP(text) !== 0, 'is not an IP address');
const hexOf = (bytes: number) => z.string().regex(new RegExp(`^[0-9a-f]{${2 * bytes}}$`), 'has the wrong length');

export const multicastGroup: z.ZodType<MulticastGroup> = z.strictObject({
  provider: multicastProvider,
  group: ipAddress,
  port: z.int().min(1).max(65_535),
  ttl: z.int().min(0).max(255),
  key: hexOf(32),
  session: hexOf(8),
  mtuBytes: datagramBytes,
});

export const hearMs = z.int().min(1).max(5_000);

export const roundTrips: z.ZodType<readonly RoundTrip[]> = z
  .array(z.strictObject({ host: hostName, us: z.number().min(0).nullable() }))
  .max(HOSTS_MAX);

export const heardProbes: z.ZodType<readonly HeardProbe[]> = z
  .array(z.strictObject({ host: hostName, largestBytes: datagramBytes }))
  .max(HOSTS_MAX);

/**
 * The daemon's configuration, from a YAML or JSON file, from flags, or from both (a flag takes precedence). Everything
 * is checked before anything is changed. Errors have the code SPEC_INVALID and name the key and its place.
 */

import { readFile } from 'node:fs/promises';
import { isIP } from 'node:net';
import { resolve } from 'node:path';
import { z } from 'zod';
import { USER_ROLES } from './domain/caller.js';
import { DATA_SECURITIES, DATA_SECURITY_DEFAULT, RDMA_TRUSTS } from './domain/data-security.js';
import { MigrationError } from './domain/errors.js';
import { ANYTHING } from './domain/policy.js';
import { ACCEL_CHOICES } from './domain/vm.js';
import { parseSize } from './kit/size.js';
import { parseYaml } from './kit/yaml.js';

const CONFIG_BYTES_MAX = 1024 * 1024;
/** The longest path of a unix socket. The name of the data socket is appended to the state directory. */
const SOCKET_PATH_BYTES_MAX = 107;
const DATA_PORT_DEFAULT = 7401;
const MULTICAST_PORT_DEFAULT = 7403;
/** No distribution and no container manager gives these to anybody (systemd's UIDS-GIDS.md: unused). */
export const QEMU_USERS_DEFAULT = { from: 1_900_000_000, count: 65_536 } as const;
const UID_MAX = 0x7fff_fffe;
/** The uids below are given to accounts by distributions. */
const QEMU_UID_MIN = 1000;
const QEMU_USERS_MAX = 65_536;
const MS_MAX = 24 * 3_600_000;
const RDMA_SCHEME = 'rdma://';

/** Stands for a port that was not given; no port has this number. */
const UNNAMED_PORT = -1;

export interface Endpoint {
  readonly address: string;
  readonly port: number;
}

export type ApiEndpoint = { readonly kind: 'unix'; readonly path: string } | ({ readonly kind: 'https' } & Endpoint);

const name = z
  .string()
  .max(48)
  .regex(/^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$/, 'must be letters, digits, ".", "_" and "-"');
const path = z
  .string()
  .min(1)
  .max(4096)
  .transform((value) => resolve(value));
const milliseconds = z.int().min(1).max(MS_MAX);

/** Parses "10.0.0.1:7400" or "[fe80::1]:7400". The port is optional if `portDefault` is a number. */
function endpoint(text: string, portDefault: number | null): Endpoint | null {
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+))(?::(\d{1,5}))?$/.exec(text);
  const address = match?.[1] ?? match?.[2] ?? (isIP(text) === 6 ? text : undefined);
  const port = match?.[3] === undefined ? portDefault : Number(match[3]);
  if (address === undefined || isIP(address) === 0 || port === null || port > 65_535) return null;
  return { address, port };
}

function rdmaEndpoint(text: string): { address: string; port: number | null } | null {
  if (!text.startsWith(RDMA_SCHEME)) return null;
  const where = endpoint(text.slice(RDMA_SCHEME.length), UNNAMED_PORT);
  return where === null ? null : { address: where.address, port: where.port === UNNAMED_PORT ? null : where.port };
}

function multicastAddress(text: string): string | null {
  const first = Number(text.split('.')[0]);
  return isIP(text) === 4 && first >= 224 && first <= 239 ? text : null;
}

function parsed<T>(parse: (text: string) => T | null, expected: string) {
  return z
    .string()
    .max(4096)
    .transform((text, context): T => {
      const value = parse(text);
      if (value !== null) return value;
      context.addIssue({ code: 'custom', message: `"${text}" is not ${expected}` });
      return z.NEVER;
    });
}

const apiEndpoint = parsed((text): ApiEndpoint | null => {
  if (text.startsWith('unix:') && text.length > 'unix:'.length) {
    const socket = resolve(text.slice('unix:'.length));
    return Buffer.byteLength(socket) <= SOCKET_PATH_BYTES_MAX ? { kind: 'unix', path: socket } : null;
  }
  const where = text.startsWith('https://') ? endpoint(text.slice('https://'.length), null) : null;
  return where === null ? null : { kind: 'https', ...where };
}, 'unix:PATH (107 bytes at most) or https://IP:PORT');

const allowedPath = z
  .string()
  .max(4096)
  .regex(/^(\/|\*$)/, 'must be an absolute path, or "*"')
  .transform((value) => (value === ANYTHING ? value : resolve(value)));
const allowedText = z.string().min(1).max(4096);
const ALLOWED_MAX = 1024;

const size = z.union([z.number(), z.string()]).transform((value, context): number => {
  const bytes = typeof value === 'number' ? value : parseSize(value);
  if (Number.isSafeInteger(bytes) && bytes >= 0) return bytes;
  context.addIssue({
    code: 'custom',
    message: `"${value}" is not a size: use a number with K, M, G or T, or of bytes`,
  });
  return z.NEVER;
});
const overcommit = z.number().min(0.1).max(1000);

const peerUrl = parsed((text) => {
  const match = /^https:\/\/([^/?#@]+)$/.exec(text);
  if (match === null || !URL.canParse(text)) return null;
  const { port } = new URL(text);
  return port === '' ? null : text;
}, 'https://ADDRESS:PORT');

const schema = z
  .strictObject({
    /** Name of this host, which is also the name in its certificate. */
    name,
    api: z.array(apiEndpoint).min(1).max(8),
    /** Address from which other hosts fetch memory. With port 0 the kernel chooses the port. */
    data: parsed((text) => endpoint(text, DATA_PORT_DEFAULT), 'ADDRESS or ADDRESS:PORT with an IP address'),
    /**
     * The same for RDMA. The default address is that of `data` if it belongs to an RDMA device, else the first address
     * that does.
     */
    rdma: z
      .strictObject({
        address: parsed(rdmaEndpoint, 'rdma://ADDRESS or rdma://ADDRESS:PORT with an IP address')
          .nullable()
          .default(null),
        /** An unanswered packet is sent again after 4.096 µs × 2^ackTimeoutExponent (18: 1.07 s). */
        ackTimeoutExponent: z.int().min(8).max(24).default(18),
        /** After this many repetitions the connection is lost. */
        retryCount: z.int().min(0).max(7).default(7),
      })
      .prefault({}),
    /**
     * How images are sent to a group of hosts (`vfork --fanout multicast`). By default each fan-out has a group of its
     * own in 239.255.0.0/16. `ttl`: how many routers a datagram may pass, the last hop included. `bandwidth`: bytes per
     * second that this host sends at most; 0: no limit.
     */
    multicast: z
      .strictObject({
        group: parsed(multicastAddress, 'a multicast IPv4 address').nullable().default(null),
        port: z.int().min(1).max(65_535).default(MULTICAST_PORT_DEFAULT),
        ttl: z.int().min(0).max(255).default(1),
        bandwidth: size.default(0),
      })
      .prefault({}),
    /** A file that says which hosts share a switch, for forks that name none. As `vfork --topology`. */
    topology: path.optional(),
    /** Folder for records, sockets and logs. It must be on a disk, because it must survive a reboot. */
    state: path,
    /** Folder for guest memory, on tmpfs or hugetlbfs. */
    ramDir: path.optional(),
    /**
     * What the VMs of this daemon may be promised together: by default what the host has, once. Daemons that share a
     * machine need a budget each.
     */
    memory: z.strictObject({ budget: size, overcommit }).partial().default({}),
    /**
     * What clones may write together: by default half of the host's memory. Each clone is promised its whole memory,
     * and the budget may be promised `overcommit` times (default 16). If it runs out, the newest clones are ended.
     */
    clones: z.strictObject({ budget: size, overcommit }).partial().default({}),
    accel: z.enum(ACCEL_CHOICES).default('auto'),
    /** The other hosts: name → URL of the https API. */
    peers: z.record(name, peerUrl).default({}),
    /** Folder with ca.pem, crl.pem, cert.pem, key.pem. */
    tls: path.optional(),
    /** The preload library for QEMU; null for none. The default is the one built with this daemon. */
    preload: path.nullable().optional(),
    qemu: z.string().min(1).max(4096).optional(),
    limits: z
      .strictObject({
        recoveryMsMax: milliseconds,
        callMsMax: milliseconds,
        undoCallMsMax: milliseconds,
        retryMsMax: milliseconds,
        runningJobsMax: z.int().min(1).max(64),
      })
      .partial()
      .default({}),
    /** Limits of the memory files of all images together. The default is half of what memory files may take. */
    images: z.strictObject({ budgetBytes: size }).partial().default({}),
    /**
     * Limits of the QEMUs that wait for forks. They are ended if little memory is available, or if tasks wait for
     * memory (PSI, `some avg10`).
     */
    pool: z
      .strictObject({
        processesMax: z.int().min(0).max(4096),
        memoryAvailableBytesMin: z.int().min(0),
        memoryStallPercentMax: z.number().min(0).max(100),
      })
      .partial()
      .default({}),
    /** Whom this host trusts with what: docs/SECURITY.md. */
    security: z
      .strictObject({
        /** The members of this group (a name or a number) may use the unix sockets of `api`. Default: root alone. */
        socketGroup: z
          .string()
          .min(1)
          .max(64)
          .regex(/^[A-Za-z0-9_.][A-Za-z0-9_.$-]*$/, 'must be a group')
          .optional(),
        /** What the members of that group may do. */
        socketRole: z.enum(USER_ROLES).default('operator'),
        /** The least protection of data connections over tcp that this host accepts. The stronger of two counts. */
        dataSecurity: z.enum(DATA_SECURITIES).default(DATA_SECURITY_DEFAULT),
        /** `trusted`: the network of RDMA is encrypted below it, so that it may be used where `encrypt` is demanded. */
        rdma: z.enum(RDMA_TRUSTS).default('untrusted'),
        /**
         * Takes data connections of hosts with an older build too, and makes such. The session's token then crosses the
         * network in clear, and nothing protects the pages. For the time of an upgrade only.
         */
        acceptOldHello: z.boolean().default(false),
        /**
         * Whom QEMU runs as. Contained, it has users of its own: one for each VM (`count` uids from `from` on, which no
         * account may have), or one for all (`count: 1`). `root`: it has the rights of the daemon.
         */
        qemuUser: z
          .union([
            z.literal('root'),
            z
              .strictObject({
                from: z.int().min(QEMU_UID_MIN).max(UID_MAX),
                count: z.int().min(1).max(QEMU_USERS_MAX).default(QEMU_USERS_MAX),
              })
              .refine(({ from, count }) => from + count <= UID_MAX, 'from + count must be a uid'),
          ])
          .default(QEMU_USERS_DEFAULT),
        /** A file that gets the audit log, one JSON object a line. Default: the daemon's own log. */
        auditLog: path.optional(),
        /** What operators may name in VMs; "*" allows everything. Default: nothing. */
        allow: z
          .strictObject({
            paths: z.array(allowedPath).max(ALLOWED_MAX).default([]),
            bridges: z.array(allowedText).max(ALLOWED_MAX).default([]),
            devices: z.array(allowedText).max(ALLOWED_MAX).default([]),
            qemuArgs: z.array(allowedText).max(ALLOWED_MAX).default([]),
          })
          .prefault({}),
      })
      .prefault({}),
    logLevel: z.enum(['debug', 'info', 'warn', 'error', 'silent']).default('info'),
    /** Honours VMIGRATE_FAULT; for tests only. */
    testFaults: z.boolean().default(false),
  })
  .superRefine((config, context) => {
    const complain = (key: string, message: string) => context.addIssue({ code: 'custom', path: [key], message });
    const isRemote = config.api.some(({ kind }) => kind === 'https') || Object.keys(config.peers).length > 0;
    if (isRemote && config.tls === undefined) complain('tls', 'an https API and peers need a certificate folder');
    if (config.security.acceptOldHello && config.security.dataSecurity === 'encrypt')
      complain(
        'security',
        'acceptOldHello takes connections that nothing protects, so it excludes dataSecurity: encrypt',
      );
    if (Object.hasOwn(config.peers, config.name)) complain('peers', `${config.name} is the name of this host`);
    if (Buffer.byteLength(dataSocketPath(config.state)) > SOCKET_PATH_BYTES_MAX)
      complain('state', 'the path is too long');
  });

export type DaemonConfig = z.output<typeof schema>;
/** The configuration as a file holds it; the flags have the same form. */
export type DaemonConfigInput = Partial<z.input<typeof schema>>;

export function dataSocketPath(stateDir: string): string {
  return `${stateDir}/data.sock`;
}

export function parseConfig(input: unknown): DaemonConfig {
  const result = schema.safeParse(input);
  if (result.success) return result.data;
  const issues = result.error.issues.flatMap((issue) =>
    issue.code === 'unrecognized_keys'
      ? issue.keys.map((key) => `${[...issue.path, key].join('.')}: unknown key`)
      : [`${issue.path.join('.') || 'configuration'}: ${issue.message}`],
  );
  throw new MigrationError('SPEC_INVALID', `configuration: ${issues.join('; ')}`);
}

/** Loads the file and overrides its values with the flags. Peers of both are joined. */
export async function loadConfig(file: string | null, flags: DaemonConfigInput): Promise<DaemonConfig> {
  const base = file === null ? {} : await readConfigFile(file);
  const basePeers = typeof base.peers === 'object' && base.peers !== null ? base.peers : {};
  const baseRdma = typeof base.rdma === 'object' && base.rdma !== null ? base.rdma : {};
  const peers = flags.peers === undefined ? {} : { peers: { ...basePeers, ...flags.peers } };
  const rdma = flags.rdma === undefined ? {} : { rdma: { ...baseRdma, ...flags.rdma } };
  return parseConfig({ ...base, ...flags, ...peers, ...rdma });
}

async function readConfigFile(file: string): Promise<Record<string, unknown>> {
  const text = await readFile(file, 'utf8').catch((cause: unknown) => {
    throw new MigrationError('SPEC_INVALID', `cannot read the configuration ${file}`, { cause });
  });
  if (text.length > CONFIG_BYTES_MAX)
    throw new MigrationError('SPEC_INVALID', `${file} is too long for a configuration`);
  let json: unknown;
  try {
    json = await parseYaml(text);
  } catch (cause) {
    throw new MigrationError('SPEC_INVALID', `${file} is not valid YAML or JSON: ${(cause as Error).message}`, {
      cause,
    });
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    throw new MigrationError('SPEC_INVALID', `${file} does not hold a configuration`);
  return json as Record<string, unknown>;
}

/**
 * VM specs. A user writes YAML or JSON, which is checked and completed with defaults. The complete form is checked
 * again when it comes from a peer or from a file. Unknown keys of a user are errors that name the key and its place;
 * those of a peer or a file are of a newer version, and are kept. All errors have the code SPEC_INVALID.
 */

import { createHash, randomUUID } from 'node:crypto';
import { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import { CLONES_MAX } from '../domain/fork.js';
import { MEMORY_BACKINGS, NIC_TYPES, type NicSpec, type VmSpec } from '../domain/vm.js';
import { parseSize } from '../kit/size.js';
import { parseKeepingUnknown } from '../kit/unknown-keys.js';
import { parseYaml } from '../kit/yaml.js';
import { accelChoice, diskFormat, hostName, imageId } from './words.js';

const KIB = 1024;
const MIB = KIB * KIB;
const GIB = KIB * MIB;
const TIB = KIB * GIB;
const PAGE_BYTES = { '4K': 4 * KIB, '2M': 2 * MIB, '1G': GIB } as const;
const MEMORY_BYTES_MIN = 16 * MIB;
const MEMORY_BYTES_MAX = 16 * TIB;
const CPUS_MAX = 1024;
const REGIONS_MAX = 16;
export const NICS_MAX = 8;
export const DISKS_MAX = 16;
const DEVICES_MAX = 32;
const QEMU_ARGS_MAX = 128;
/** Reading a text of this length takes some tenths of a second, in which the daemon does nothing else. */
const SPEC_BYTES_MAX = 16 * KIB;
/** Options of QEMU that the daemon sets itself, or that would break its control of QEMU. */
const LOCKED_QEMU_OPTIONS = [
  ...['qmp', 'qmp-pretty', 'mon', 'monitor', 'serial', 'incoming', 'loadvm', 'snapshot', 'readconfig'],
  ...['daemonize', 'pidfile', 'sandbox', 'chroot', 'runas', 'run-with', 'preconfig', 'no-shutdown', 'S'],
  ...['name', 'uuid', 'machine', 'M', 'm', 'mem-path', 'mem-prealloc', 'accel', 'enable-kvm', 'smp'],
  ...['help', 'h', 'version'],
];
const LOCKED_QEMU_ARGS = new RegExp(`^--?(${LOCKED_QEMU_OPTIONS.join('|')})$`);

/** One line of text, without control characters, which could end a line in a log, an environment or a command line. */
const text = (max: number) =>
  z
    .string()
    .min(1)
    .max(max)
    // oxlint-disable-next-line no-control-regex
    .regex(/^[^\u0000-\u001f\u007f]*$/, 'must not contain control characters');
const name = z.string().regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'must be at most 63 lower-case letters, digits and "-"');
const id = z
  .string()
  .regex(/^[a-z][a-z0-9-]{0,31}$/, 'must be at most 32 lower-case letters, digits and "-", a letter first');
const absolutePath = text(4096).regex(/^\//, 'must be an absolute path');
const mac = z
  .string()
  .regex(/^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$/i, 'must be a unicast MAC address such as 52:54:00:12:34:56')
  .transform((value) => value.toLowerCase());
const machine = z.string().regex(/^[a-z0-9][a-z0-9._-]{0,63}$/, 'must be a QEMU machine type such as q35');
const cpuModel = z.string().regex(/^[A-Za-z0-9][A-Za-z0-9._+,=-]{0,255}$/, 'must be a QEMU CPU model such as qemu64');
const nicModel = z.string().regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/, 'must be a QEMU device such as virtio-net-pci');
const bridge = z.string().regex(/^[A-Za-z0-9_.-]{1,15}$/, 'must be the name of a network bridge');
const cpus = z.int().min(1).max(CPUS_MAX);
const memoryBytes = z
  .int()
  .min(MEMORY_BYTES_MIN, 'must be at least 16 MiB')
  .max(MEMORY_BYTES_MAX, 'must be at most 16 TiB');
const devices = z.array(text(1024)).max(DEVICES_MAX);
const qemuArgs = z.array(text(4096)).max(QEMU_ARGS_MAX);

const served = z.strictObject({ host: hostName, image: imageId });
const diskSpec = z.strictObject({
  ...{ id, path: absolutePath, format: diskFormat, isReadOnly: z.boolean() },
  served: served.exactOptional(),
});
const nicSpec = z.strictObject({
  id,
  type: z.enum(NIC_TYPES),
  bridge: bridge.optional(),
  mac,
  model: nicModel,
});
const guid = z.guid().transform((value) => value.toLowerCase());
const cloneMark = z
  .strictObject({
    fork: z.string().regex(/^[0-9a-f]{16}$/, 'must be 16 hexadecimal digits'),
    index: z.int().min(0),
    cloneCount: z.int().min(1).max(CLONES_MAX),
  })
  .refine((clone) => clone.index < clone.cloneCount, { path: ['index'], message: 'must be less than cloneCount' });

/** The complete form, used between hosts and in records. */
const vmSpec = z
  .strictObject({
    name,
    uuid: guid,
    machine,
    accel: accelChoice,
    cpuModel,
    cpus,
    memory: z.strictObject({
      sizeBytes: memoryBytes,
      pageBytes: z.union([z.literal(PAGE_BYTES['4K']), z.literal(PAGE_BYTES['2M']), z.literal(PAGE_BYTES['1G'])]),
      regions: z
        .array(z.strictObject({ id, lengthBytes: memoryBytes }))
        .min(1)
        .max(REGIONS_MAX),
      backing: z.enum(MEMORY_BACKINGS),
    }),
    kernel: absolutePath.optional(),
    initrd: absolutePath.optional(),
    append: text(4096).optional(),
    disks: z.array(diskSpec).max(DISKS_MAX),
    nics: z.array(nicSpec).max(NICS_MAX),
    hasSerial: z.boolean(),
    hasGuestAgent: z.boolean().optional(),
    guestAgentHook: absolutePath.optional(),
    vmGenerationId: guid.optional(),
    clone: cloneMark.optional(),
    devices,
    qemuArgs,
    hasPreload: z.boolean(),
  })
  .superRefine((spec, context) => {
    const complain = (path: (string | number)[], message: string) =>
      context.addIssue({ code: 'custom', path, message });
    const ids = new Set<string>();
    const claim = (value: string, path: (string | number)[]) => {
      if (ids.has(value)) complain(path, `the id "${value}" is used twice`);
      ids.add(value);
    };
    spec.memory.regions.forEach((region, index) => {
      claim(region.id, ['memory', 'regions', index, 'id']);
      if (region.lengthBytes % spec.memory.pageBytes !== 0) {
        complain(['memory', 'regions', index], 'must be a multiple of the page size');
      }
    });
    spec.disks.forEach((disk, index) => claim(disk.id, ['disks', index, 'id']));
    spec.nics.forEach((nic, index) => {
      claim(nic.id, ['nics', index, 'id']);
      const isBridged = nic.type === 'tap' || nic.type === 'isolated';
      if (isBridged && nic.bridge === undefined) complain(['nics', index, 'bridge'], 'a tap needs a bridge');
      if (!isBridged && nic.bridge !== undefined) complain(['nics', index, 'bridge'], 'only a tap has a bridge');
      if (nic.type === 'tap' && spec.nics.some((other) => other.type === 'isolated')) {
        complain(['nics', index, 'type'], 'a VM in its own network namespace cannot reach a bridge of the host');
      }
    });
    const regionBytes = spec.memory.regions.reduce((sum, region) => sum + region.lengthBytes, 0);
    if (regionBytes !== spec.memory.sizeBytes) {
      complain(
        ['memory', 'regions'],
        `the lengths of the regions add up to ${regionBytes} bytes, not to ${spec.memory.sizeBytes}`,
      );
    }
    if (spec.kernel === undefined && spec.initrd !== undefined) complain(['initrd'], 'needs a kernel');
    if (spec.kernel === undefined && spec.append !== undefined) complain(['append'], 'needs a kernel');
    if (spec.guestAgentHook !== undefined && spec.hasGuestAgent !== true) {
      complain(['guestAgentHook'], 'needs guestAgent: true');
    }
    spec.devices.forEach((device, index) => {
      if (/^vmgenid\b/.test(device)) complain(['devices', index], 'the daemon sets vmgenid itself');
    });
    spec.qemuArgs.forEach((argument, index) => {
      if (LOCKED_QEMU_ARGS.test(argument)) complain(['qemuArgs', index], `${argument} is reserved for the daemon`);
    });
  });

const size = z.union([z.number(), z.string()]).transform((value, context) => {
  const bytes = typeof value === 'number' ? value : parseSize(value);
  if (Number.isSafeInteger(bytes) && bytes >= MEMORY_BYTES_MIN && bytes <= MEMORY_BYTES_MAX) return bytes;
  if (Number.isInteger(bytes)) {
    context.addIssue({ code: 'custom', message: `"${value}" is not between 16 MiB and 16 TiB` });
    return z.NEVER;
  }
  context.addIssue({
    code: 'custom',
    message: `"${value}" is not a size: use a number of bytes, or a number with K, M, G or T`,
  });
  return z.NEVER;
});

const userSpec = z.strictObject({
  name,
  uuid: z.guid().optional(),
  machine: machine.default('q35'),
  accel: accelChoice.default('auto'),
  cpuModel: cpuModel.default('qemu64'),
  cpus: cpus.default(1),
  memory: z.strictObject({
    size: size.optional(),
    pageSize: z.enum(['4K', '2M', '1G']).default('4K'),
    /** One region for each NUMA node. */
    regions: z
      .array(z.strictObject({ id: id.optional(), size }))
      .min(1)
      .max(REGIONS_MAX)
      .optional(),
    backing: z.enum(['shared', 'private']).default('shared'),
  }),
  kernel: absolutePath.optional(),
  initrd: absolutePath.optional(),
  append: text(4096).optional(),
  disks: z
    .array(
      z.strictObject({
        id: id.optional(),
        path: absolutePath,
        format: diskFormat.optional(),
        readOnly: z.boolean().default(false),
      }),
    )
    .max(DISKS_MAX)
    .default([]),
  nics: z
    .array(
      z.strictObject({
        id: id.optional(),
        type: z.enum(['tap', 'none']).optional(),
        bridge: bridge.optional(),
        mac: mac.optional(),
        model: nicModel.default('virtio-net-pci'),
      }),
    )
    .max(NICS_MAX)
    .default([]),
  serial: z.boolean().default(true),
  guestAgent: z.boolean().default(false),
  guestAgentHook: absolutePath.optional(),
  devices: devices.default([]),
  qemuArgs: qemuArgs.default([]),
  preload: z.boolean().default(true),
});

/** The schema of a user's spec, for OpenAPI and docs. */
export const userSpecSchema = userSpec;
/** The schema of the complete form, for messages between hosts. */
export const vmSpecSchema: z.ZodType<VmSpec> = vmSpec as unknown as z.ZodType<VmSpec>;

export const nicSpecSchema: z.ZodType<NicSpec> = nicSpec as unknown as z.ZodType<NicSpec>;

/**
 * Reads a user's spec from the API: text (YAML, which includes JSON) or an object. The YAML parser is loaded with the
 * first text.
 */
export async function readSpec(input: unknown): Promise<VmSpec> {
  return parseSpec(typeof input === 'string' ? await parseText(input) : input);
}

/** Checks a user's spec and fills in all defaults. */
export function parseSpec(input: unknown): VmSpec {
  const user = check(userSpec, input);
  const { memory } = user;
  if (memory.size === undefined && memory.regions === undefined) {
    throw new MigrationError('SPEC_INVALID', 'VM spec: memory.size is missing');
  }
  const regions = memory.regions?.map((region, index) => ({
    id: region.id ?? `ram${index}`,
    lengthBytes: region.size,
  }));
  const totalBytes = memory.size ?? regions?.reduce((sum, region) => sum + region.lengthBytes, 0) ?? 0;
  const uuid = user.uuid ?? randomUUID();
  return checkSpec(
    withoutUndefined({
      name: user.name,
      uuid,
      machine: user.machine,
      accel: user.accel,
      cpuModel: user.cpuModel,
      cpus: user.cpus,
      memory: {
        sizeBytes: totalBytes,
        pageBytes: PAGE_BYTES[memory.pageSize],
        regions: regions ?? [{ id: 'ram0', lengthBytes: totalBytes }],
        backing: memory.backing,
      },
      kernel: user.kernel,
      initrd: user.initrd,
      append: user.append,
      disks: user.disks.map((disk, index) => ({
        id: disk.id ?? `disk${index}`,
        path: disk.path,
        format: disk.format ?? (disk.path.endsWith('.qcow2') ? 'qcow2' : 'raw'),
        isReadOnly: disk.readOnly,
      })),
      nics: user.nics.map((nic, index) => {
        const nicId = nic.id ?? `net${index}`;
        return withoutUndefined({
          id: nicId,
          type: nic.type ?? (nic.bridge === undefined ? 'none' : 'tap'),
          bridge: nic.bridge,
          mac: nic.mac ?? macFor(uuid, nicId),
          model: nic.model,
        });
      }),
      hasSerial: user.serial,
      hasGuestAgent: user.guestAgent,
      guestAgentHook: user.guestAgentHook,
      vmGenerationId: randomUUID(),
      devices: user.devices,
      qemuArgs: user.qemuArgs,
      hasPreload: user.preload,
    }),
  );
}

/** Checks a spec in its complete form, from a peer or a file. Keys of a newer version are kept. */
export function checkSpec(input: unknown): VmSpec {
  return checked(parseKeepingUnknown(vmSpecSchema, input));
}

async function parseText(spec: string): Promise<unknown> {
  if (Buffer.byteLength(spec) > SPEC_BYTES_MAX) {
    throw new MigrationError('SPEC_INVALID', `VM spec: longer than ${SPEC_BYTES_MAX} bytes`);
  }
  try {
    return await parseYaml(spec);
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new MigrationError('SPEC_INVALID', `VM spec: not valid YAML or JSON: ${message}`, { cause: error });
  }
}

function check<T>(schema: z.ZodType<T>, input: unknown): T {
  return checked(schema.safeParse(input));
}

function checked<T>(result: z.ZodSafeParseResult<T>): T {
  if (result.success) return result.data;
  const issues = result.error.issues.flatMap((issue) => describe(issue));
  const shown = issues.map((issue) => `${issue.path}: ${issue.message}`).join('; ');
  throw new MigrationError('SPEC_INVALID', `VM spec: ${shown}`, { details: issues });
}

function describe(issue: z.core.$ZodIssue): { path: string; message: string }[] {
  const path = issue.path.reduce<string>(
    (path, part) =>
      typeof part === 'number' ? `${path}[${part}]` : path === '' ? String(part) : `${path}.${String(part)}`,
    '',
  );
  if (issue.code !== 'unrecognized_keys') return [{ path: path || '(top level)', message: issue.message }];
  return issue.keys.map((key) => ({ path: path === '' ? key : `${path}.${key}`, message: 'unknown key' }));
}

/** Derives a stable MAC: a spec with a fixed uuid gets the same one each time. 52:54:00 is QEMU's usual prefix. */
function macFor(uuid: string, nicId: string): string {
  const digest = createHash('sha256').update(`${uuid}/${nicId}`).digest('hex');
  return `52:54:00:${digest.slice(0, 2)}:${digest.slice(2, 4)}:${digest.slice(4, 6)}`;
}

function withoutUndefined<T extends object>(value: T): object {
  return Object.fromEntries(Object.entries(value).filter(([, member]) => member !== undefined));
}

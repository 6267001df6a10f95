/** Answers what pre-flight asks a host. Each call inspects the host again and changes nothing. */
import { constants } from 'node:fs';
import type { DiskFiles } from '../../backends/disk-files.js';
import { DATA_POLICY_DEFAULT, type DataPolicy } from '../../domain/data-security.js';
import type { HostInventory, SocketMark, TargetChecks, VmInventory } from '../../domain/host.js';
import { describeForbidden, type Forbidden } from '../../domain/policy.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { DiskSpec, VmSpec } from '../../domain/vm.js';
import { isKernelAtLeast } from '../../kit/kernel-version.js';
import { openUserFile } from '../../kit/user-file.js';
import { OLD_HELLO_VERSION, PROTOCOL_VERSION } from '../../protocol/wire.js';
import type { ImageContext } from '../image/context.js';
import { forbiddenOnHost, namingOnly } from '../policy/policy.js';
import type { HostContext } from '../vm/context.js';
import { hostFacts } from './host-facts.js';
import { hostLimits } from './limits.js';
import { fleetingDisks, ownBytes, ramAllocatedBytes, ramFacts } from './vm-facts.js';

/**
 * Linux 6.7 has the calls. Before 6.9 a scan may lose that a page is dirty ("fs/proc/task_mmu: fix loss of young/dirty
 * bits during pagemap scan"), and a page of the guest that is swapped out then is lost.
 */
const TRACKING_KERNEL = [6, 9] as const;

export interface HostInfo {
  readonly preloadPath: string | null;
  /** Why QEMU cannot be contained, or null. Absent: it is not contained. */
  readonly containmentProblem?: () => Promise<string | null>;
  /** Why the daemon has no tmpfs of its own for guest memory, or null. */
  readonly ramDirProblem: string | null;
  /** Absent: the default. */
  readonly dataPolicy?: DataPolicy;
  /** Null: this host does not tell. */
  readonly socketMark: SocketMark | null;
  /** ISO time. Null if no https API is configured. */
  certificateExpiresAt(): string | null;
}

export async function hostInventory(context: HostContext, info: HostInfo): Promise<HostInventory> {
  const { vms, native, host, dataAddress, rdma } = context;
  const support = native.support();
  const policy = info.dataPolicy ?? DATA_POLICY_DEFAULT;
  return {
    ...(await hostFacts(vms)),
    host,
    ...(policy.acceptOldHello
      ? { protocolVersion: OLD_HELLO_VERSION, newestProtocolVersion: PROTOCOL_VERSION }
      : { protocolVersion: PROTOCOL_VERSION }),
    dataSecurity: policy.dataSecurity,
    canVerifyMemory: true,
    canFetchAhead: true,
    canTrackWrites: support.wpAsync && support.pagemapScan && isKernelAtLeast(TRACKING_KERNEL),
    ...(policy.rdma === 'trusted' ? { rdmaTrust: policy.rdma } : {}),
    isUserfaultfdPermitted: support.userfaultfdPermitted,
    hasMinorFaults: support.minorShmem,
    isPreloadPresent: info.preloadPath !== null && (await refusal(info.preloadPath, constants.R_OK)) === null,
    ...(info.containmentProblem === undefined ? {} : { containmentProblem: await info.containmentProblem() }),
    dataAddress,
    ...(info.socketMark === null ? {} : { socketMark: info.socketMark }),
    rdma: await rdma.inventory(),
    certificateExpiresAt: info.certificateExpiresAt(),
    clockMs: Date.now(),
    ...(info.ramDirProblem === null ? {} : { ramDirProblem: info.ramDirProblem }),
    limits: await hostLimits(),
  };
}

export async function vmInventory(context: ImageContext, name: string): Promise<VmInventory> {
  const { vms, registry, host, native, images } = context;
  const vm = vms.get(name);
  const owner = await registry.owner(name);
  const isUp = vm.state === 'running' || vm.state === 'paused';
  if (isUp) await vm.process.connected();
  const ram = isUp ? await ramFacts(vm) : { isRamShared: vm.regions.length > 0, isRamNamedFile: vm.regions.length > 0 };
  return {
    spec: vm.spec,
    state: vm.state,
    epoch: vm.epoch,
    owner: owner?.owner ?? host,
    ...(owner?.incarnation === undefined ? {} : { incarnation: owner.incarnation }),
    job: vm.job,
    qemuVersion: vm.qemuVersion,
    accel: vm.accel,
    ...ram,
    migrationBlockers: [
      ...(isUp ? await vm.process.facts.migrationBlockers() : []),
      ...vms.backend.devicesIn(vm.spec).withoutState,
    ],
    ramAllocatedBytes: isUp ? ramAllocatedBytes(native, vm) : 0,
    discardingDevices: isUp ? await vm.process.facts.discardingDevices() : [],
    escapingDevices: vms.backend.devicesIn(vm.spec).escaping,
    directDisks: isUp ? await vm.process.facts.directDisks() : [],
    image:
      vm.image === null
        ? null
        : {
            id: vm.image,
            isComplete: images.get(vm.image).state === 'complete',
            ownBytes: isUp ? await ownBytes(vm) : 0,
          },
    identityIssue: vms.view(vm).identityIssue,
    fleetingDisks: fleetingDisks(vm),
    exitCode: await vms.exitCode(name),
    deviceChanges: isUp ? await vm.process.facts.deviceChanges(vm.spec) : [],
  };
}

/** Opens only what the policy allows. Disks are judged apart: a host that joins a fork may not need their files. */
export async function checkTarget(
  { rdma, vms, policy }: Pick<HostContext, 'rdma' | 'vms' | 'policy'>,
  spec: VmSpec,
  source: RdmaPlace | null,
): Promise<TargetChecks> {
  const { diskFiles } = vms.backend;
  const forbidden = await forbiddenOnHost({ ...spec, disks: [] }, policy, diskFiles);
  const paths = forbidden.length > 0 ? [] : [spec.kernel, spec.initrd].filter((path) => path !== undefined);
  return {
    disks: await Promise.all(
      spec.disks.map(async (disk) => {
        const ofDisk = await forbiddenOnHost(namingOnly(disk), policy, diskFiles);
        return ofDisk.length === 0 ? checkDisk(disk, diskFiles) : forbiddenDisk(disk, ofDisk);
      }),
    ),
    files: await Promise.all(
      paths.map(async (path) => ({ path, isReadable: (await refusal(path, constants.R_OK)) === null })),
    ),
    ...(forbidden.length === 0 ? {} : { forbidden }),
    rdma: source === null ? null : await rdma.probe(source),
  };
}

function forbiddenDisk({ path }: DiskSpec, forbidden: readonly Forbidden[]): TargetChecks['disks'][number] {
  const reason = `the policy does not allow ${describeForbidden(forbidden)}`;
  return { path, isReadable: false, isWritable: false, reason, forbidden };
}

async function checkDisk(disk: DiskSpec, files: DiskFiles): Promise<TargetChecks['disks'][number]> {
  const { path, format, isReadOnly } = disk;
  const unreadable = await refusal(path, constants.R_OK);
  const unwritable = await refusal(path, constants.W_OK);
  const reason = unreadable ?? (isReadOnly ? null : unwritable) ?? (await files.openProblem(path, format));
  return {
    path,
    isReadable: unreadable === null && (reason === null || reason === unwritable),
    isWritable: unwritable === null,
    ...(reason === null ? {} : { reason }),
  };
}

/**
 * Returns the reason why the file cannot be opened, or null. The file is really opened, because an NFS server or a
 * security module may refuse what the mode bits allow. Opening changes nothing.
 */
async function refusal(path: string, mode: number): Promise<string | null> {
  try {
    await (await openUserFile(path, mode === constants.W_OK ? 'readWrite' : 'read')).close();
    return null;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

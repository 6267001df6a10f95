/** Checks whether a host can take over VMs of another one: a migration's target, or a host that joins a fork. Pure. */
import type { HostInventory, TargetChecks, VmInventory } from '../domain/host.js';
import { describeForbidden, remedyFor } from '../domain/policy.js';
import type { Refusal, RefusalCode } from '../domain/refusal.js';
import type { VmSpec } from '../domain/vm.js';
import { isOlder, parseQemuVersion } from './qemu-version.js';

/** The oldest QEMU with which this project is tested. */
const QEMU_VERSION_MIN = { major: 7, minor: 2 };

/** Certificates and reports carry dates. A larger difference means that nobody sets one of the clocks. */
const CLOCK_SKEW_MS_MAX = 300_000;

export interface QemuNeeds {
  /** This project's pager serves the VM's memory, not QEMU. */
  readonly isPaged: boolean;
  /** Pages are fetched or mapped while the VM runs. */
  readonly fetches: boolean;
}

export function* checkPeers(source: HostInventory, target: HostInventory): Iterable<Refusal> {
  if (!haveCommonProtocol(source, target)) {
    yield refuse(
      'PROTOCOL_VERSION',
      `protocol versions differ: ${source.host} ${source.protocolVersion}, ${target.host} ${target.protocolVersion}`,
      'install the same vmigrate on both hosts',
    );
  }
  const skewMs = Math.abs(target.clockMs - source.clockMs);
  if (!(skewMs <= CLOCK_SKEW_MS_MAX)) {
    const skew = `${(skewMs / 1000).toFixed(0)} s, at most ${CLOCK_SKEW_MS_MAX / 1000} s are allowed`;
    yield refuse(
      'CLOCK_SKEW',
      `the clocks of ${source.host} and ${target.host} differ by ${skew}`,
      'synchronize both clocks, for example by NTP',
    );
  }
  for (const { host, certificateExpiresAt } of [source, target]) {
    if (certificateExpiresAt === null) continue;
    if (!(Date.parse(certificateExpiresAt) > source.clockMs)) {
      yield refuse(
        'CERTIFICATE_EXPIRED',
        `the certificate of ${host} expired at ${certificateExpiresAt}`,
        `create a new certificate with "vmctl certs" and restart vmigrated on ${host}`,
      );
    }
  }
}

function haveCommonProtocol(source: HostInventory, target: HostInventory): boolean {
  const spoken = versionsOf(source);
  return versionsOf(target).some((version) => spoken.includes(version));
}

function versionsOf({ protocolVersion, newestProtocolVersion = protocolVersion }: HostInventory): readonly number[] {
  return [protocolVersion, newestProtocolVersion];
}

export function* checkQemu(target: HostInventory, vm: VmInventory, { isPaged, fetches }: QemuNeeds): Iterable<Refusal> {
  const { host } = target;
  const wanted = parseQemuVersion(vm.qemuVersion);
  const present = target.qemuVersion === null ? null : parseQemuVersion(target.qemuVersion);
  if (present === null) {
    const reason =
      target.qemuVersion === null
        ? `${host} has no QEMU`
        : `${host} reports an unknown QEMU version "${target.qemuVersion}"`;
    yield refuse('QEMU_TOO_OLD', reason, `install qemu-system-x86 on ${host}`);
  } else if (isOlder(present, QEMU_VERSION_MIN)) {
    const oldest = `${QEMU_VERSION_MIN.major}.${QEMU_VERSION_MIN.minor}`;
    yield refuse(
      'QEMU_TOO_OLD',
      `${host} has QEMU ${target.qemuVersion}; the oldest supported version is ${oldest}`,
      `upgrade QEMU on ${host}`,
    );
  } else if (wanted === null || isOlder(present, wanted)) {
    const versions = `${host} has QEMU ${target.qemuVersion}, ${vm.spec.name} runs in QEMU ${vm.qemuVersion}`;
    yield refuse(
      'QEMU_TOO_OLD',
      `${versions}; QEMU migrates only to the same or a newer version`,
      `upgrade QEMU on ${host}`,
    );
  }
  if (!target.machines.includes(vm.spec.machine)) {
    yield refuse(
      'MACHINE_MISSING',
      `QEMU on ${host} does not know the machine type ${vm.spec.machine}`,
      `upgrade QEMU on ${host}, or run the VM with a machine type that both hosts know`,
    );
  }
  if (vm.accel === 'kvm' && !target.isKvmUsable) {
    yield refuse('ACCEL_MISSING', `${vm.spec.name} runs under KVM, which ${host} cannot use`, 'choose a host with KVM');
  }
  if (isPaged && !target.isPreloadPresent) {
    yield refuse(
      'PRELOAD_MISSING',
      `${host} lacks the preload library, which is needed to serve the VM's missing pages`,
      `build the library there ("npm run setup"), or set preload in the configuration of vmigrated`,
    );
  }
  if (!fetches) return;
  if (!target.isUserfaultfdPermitted) {
    yield refuse(
      'USERFAULTFD_NOT_PERMITTED',
      `the kernel of ${host} does not let vmigrated use userfaultfd`,
      'run vmigrated as root or with CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd=1',
    );
  } else if (isPaged && !target.hasMinorFaults) {
    yield refuse(
      'USERFAULTFD_NOT_PERMITTED',
      `the kernel of ${host} has no userfaultfd minor faults for shared memory`,
      'use a kernel of version 5.14 or newer',
    );
  }
}

/** What a host lets other hosts bring. `opened`: the paths of the disks that are opened there. */
export function* checkPolicy(
  host: string,
  vm: string,
  checks: TargetChecks,
  opened: readonly string[],
): Iterable<Refusal> {
  const ofDisks = checks.disks.flatMap(({ path, forbidden = [] }) => (opened.includes(path) ? forbidden : []));
  const forbidden = [...(checks.forbidden ?? []), ...ofDisks];
  if (forbidden.length === 0) return;
  const reason = `the policy of ${host} does not allow what ${vm} names: ${describeForbidden(forbidden)}`;
  yield refuse('POLICY_FORBIDS', reason, remedyFor(forbidden, host));
}

/** What the VM boots from is read again by each QEMU that starts for it. */
export function* checkBootFiles(host: string, spec: VmSpec, checks: TargetChecks): Iterable<Refusal> {
  // No file was opened.
  if (checks.forbidden !== undefined) return;
  const remedy = `make the same file available on ${host} under the same path`;
  for (const path of [spec.kernel, spec.initrd]) {
    if (path === undefined || isFileReadable(path, checks)) continue;
    yield refuse('FILE_MISSING', `${host} cannot read ${path}, which ${spec.name} boots from`, remedy);
  }
}

export function isFileReadable(path: string, { files }: TargetChecks): boolean {
  return files.some((file) => file.path === path && file.isReadable);
}

export function* checkBridges({ host, bridges }: HostInventory, spec: VmSpec): Iterable<Refusal> {
  for (const nic of spec.nics) {
    if (nic.type !== 'tap' || (nic.bridge !== undefined && bridges.includes(nic.bridge))) continue;
    yield refuse(
      'BRIDGE_MISSING',
      `NIC ${nic.id} of ${spec.name} needs the bridge ${nic.bridge ?? '(not named)'}, which ${host} does not have`,
      `create the bridge on ${host}`,
    );
  }
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

/**
 * Checks what this host can do, with a remedy for each problem. These are the checks of pre-flight, for a person to see
 * beforehand.
 */
import { release } from 'node:os';
import { toMigrationError } from '../../domain/errors.js';
import { type HostInventory, STATE_ROOM_BYTES } from '../../domain/host.js';
import type { RdmaDevice, RdmaInventory } from '../../domain/transport.js';
import type { DoctorCheck } from '../../schemas/host.js';
import type { ApiServices } from '../contract/ports.js';
import { limitChecks } from './doctor-limits.js';
import { multicastVerdict } from './doctor-multicast.js';
import { fail, ok, type Verdict, warn } from './doctor-verdict.js';

const MIB = 2 ** 20;
const DAY_MS = 86_400_000;
const CERTIFICATE_WARN_DAYS = 30;
const RAM_FILES_WARN_BYTES = 512 * MIB;
const KERNEL_MIN = [5, 14];
/** The oldest kernel that can write-protect shared memory through userfaultfd. */
const KERNEL_FORK_MIN = [5, 19];
const QEMU_MIN = [7, 2];

function isAtLeast(version: string, [major = 0, minor = 0]: readonly number[]): boolean {
  const [, found = '0', foundMinor = '0'] = /(\d+)\.(\d+)/.exec(version) ?? [];
  return Number(found) > major || (Number(found) === major && Number(foundMinor) >= minor);
}

function kernel(version: string): Verdict {
  return isAtLeast(version, KERNEL_MIN)
    ? ok(`Linux ${version}`)
    : fail(`Linux ${version} has no minor faults on tmpfs`, 'run Linux 5.14 or newer (Debian 12 has 6.1)');
}

function qemu(version: string | null, problem: string | undefined): Verdict {
  if (version === null)
    return fail(
      problem ?? 'no QEMU found',
      'install it: apt-get install qemu-system-x86, or correct the key qemu in the configuration',
    );
  return isAtLeast(version, QEMU_MIN)
    ? ok(`QEMU ${version}`)
    : fail(`QEMU ${version} is too old`, `install QEMU ${QEMU_MIN.join('.')} or newer`);
}

function userfaultfd(inventory: HostInventory): Verdict {
  return inventory.isUserfaultfdPermitted
    ? ok('permitted')
    : fail('not permitted', 'run the daemon as root, or sysctl -w vm.unprivileged_userfaultfd=1');
}

function minorFaults(inventory: HostInventory): Verdict {
  // A kernel that does not permit userfaultfd does not tell what it could do.
  if (!inventory.isUserfaultfdPermitted)
    return fail('unknown, because userfaultfd is not permitted', 'run the daemon as root, then ask again');
  return inventory.hasMinorFaults
    ? ok('on tmpfs')
    : fail('not supported on tmpfs', 'run Linux 5.14 or newer with CONFIG_USERFAULTFD');
}

function forks(version: string): Verdict {
  return isAtLeast(version, KERNEL_FORK_MIN)
    ? ok('memory can be write-protected')
    : warn(
        `Linux ${version} cannot write-protect shared memory`,
        'run Linux 5.19 or newer, or fork with --parent stop',
      );
}

function pushes({ isUserfaultfdPermitted, canTrackWrites = false }: HostInventory): Verdict {
  if (canTrackWrites) return ok('writes of running VMs can be noted (--hybrid, --precopy)');
  return isUserfaultfdPermitted
    ? warn('writes of running VMs cannot be noted: no --hybrid, no --precopy from here', 'run Linux 6.9 or newer')
    : warn('unknown, because userfaultfd is not permitted', 'run the daemon as root, then ask again');
}

function kvm(inventory: HostInventory): Verdict {
  return inventory.isKvmUsable
    ? ok('usable')
    : warn('not usable here: guests are emulated (TCG)', 'run on a machine whose CPU shows vmx or svm, with /dev/kvm');
}

function ramFiles(inventory: HostInventory): Verdict {
  const text = `${Math.floor(inventory.ramFileFreeBytes / MIB)} MiB not promised to guests yet`;
  if (inventory.ramDirProblem !== undefined)
    return warn(
      `${text}; ${inventory.ramDirProblem}`,
      'run vmigrated as root with CAP_SYS_ADMIN, or mount a tmpfs and name it with --ram-dir; ' +
        'until then the file system that is there is used, which may be small',
    );
  return inventory.ramFileFreeBytes >= RAM_FILES_WARN_BYTES
    ? ok(text)
    : warn(
        text,
        'end VMs, enlarge the tmpfs (mount -o remount,size=…), use another with --ram-dir, or raise memory.budget',
      );
}

function stateRoom({ stateFreeBytes }: HostInventory): Verdict {
  if (stateFreeBytes === undefined) return ok('not looked at');
  const text = `${Math.floor(stateFreeBytes / MIB)} MiB free for records and logs`;
  if (stateFreeBytes >= STATE_ROOM_BYTES) return ok(text);
  return warn(`${text}: new VMs and moves are refused`, 'free space on the file system of the state directory');
}

function dataSecurity({ dataSecurity: least = 'none', rdmaTrust, newestProtocolVersion }: HostInventory): Verdict {
  const old = 'peers of an older build are taken, whose sessions have no protection';
  if (newestProtocolVersion !== undefined) return warn(old, 'upgrade all hosts, then remove security.acceptOldHello');
  if (least === 'none')
    return warn('nothing protects memory on the data network', 'set security.dataSecurity to integrity or encrypt');
  return ok(`${least} over TCP at least${rdmaTrust === 'trusted' ? '; the network of RDMA is trusted' : ''}`);
}

function hugePages(inventory: HostInventory): Verdict {
  const free = Object.entries(inventory.hugePagesFree).filter(([, count]) => count > 0);
  if (free.length === 0) return ok('none reserved; VMs with 4 KiB pages need none');
  return ok(free.map(([bytes, count]) => `${count} free of ${Number(bytes) / MIB} MiB`).join(', '));
}

/** Only RDMA locks memory, so the limits do not matter on a host without RDMA. */
function memlock({ lockableBytes, problem }: RdmaInventory): Verdict {
  if (lockableBytes === null) return ok('no limit');
  const text = `${Math.floor(lockableBytes / MIB)} MiB may be locked, so RDMA cannot move a larger VM`;
  if (problem !== null) return ok(text);
  return warn(text, 'LimitMEMLOCK=infinity in the unit of vmigrated, or run it as root or with CAP_IPC_LOCK');
}

function cgroup({ cgroupFreeBytes }: RdmaInventory): Verdict {
  if (cgroupFreeBytes === null) return ok('no limit');
  return ok(`${Math.floor(cgroupFreeBytes / MIB)} MiB free in the cgroup of vmigrated`);
}

function rdma({ problem, address, port }: RdmaInventory): Verdict {
  return problem === null ? ok(`at ${address} port ${port}`) : warn(problem.reason, problem.remedy);
}

function rdmaDevice({ isOnDemandPaging, ports }: RdmaDevice): Verdict {
  const paging = isOnDemandPaging ? 'on-demand paging' : 'no on-demand paging';
  const described = ports.map(({ number, state, linkLayer, mtuBytes, addresses, gids }) =>
    [
      `port ${number} ${state}`,
      linkLayer,
      `MTU ${mtuBytes}`,
      `address ${addresses.join(' ') || 'none'}`,
      `GIDs ${gids.join(' ') || 'none'}`,
    ].join(', '),
  );
  const text = [...described, paging].join('; ');
  return ports.some(({ isActive }) => isActive)
    ? ok(text)
    : warn(text, 'check the cable and "rdma link"; InfiniBand also needs a running subnet manager');
}

function certificate(services: ApiServices): Verdict {
  if (services.tls === null)
    return warn('no TLS folder: this host cannot take part in migrations', 'vmctl certs host NAME …, then --tls DIR');
  const { expiresAt } = services.tls;
  const days = Math.floor((Date.parse(expiresAt) - Date.now()) / DAY_MS);
  const remedy = `create a new certificate: vmctl certs host ${services.host} --address IP --dir CA_DIR --out DIR`;
  if (days < 0) return fail(`expired on ${expiresAt}`, remedy);
  const text = `valid until ${expiresAt}`;
  return days < CERTIFICATE_WARN_DAYS ? warn(text, remedy) : ok(text);
}

async function peer(services: ApiServices, name: string): Promise<Verdict> {
  try {
    const { roundTripMs } = await services.peers.check(name);
    return ok(`${services.peers.url(name)}, ${roundTripMs.toFixed(1)} ms`);
  } catch (thrown) {
    const error = toMigrationError(thrown);
    return fail(`${error.code}: ${error.message}`, error.remedy ?? `start vmigrated on ${name}, check the network`);
  }
}

function containment(problem: string | null | undefined): Verdict {
  if (problem === null) return ok('QEMU runs as users of its own, in roots of its own');
  if (problem === undefined) {
    return warn(
      'QEMU runs with the rights of the daemon: a guest that breaks out has the host',
      'unset security.qemuUser',
    );
  }
  return fail(
    `QEMU cannot be contained, so no VM starts: ${problem}`,
    'this needs root, Linux 6.1 and mount namespaces; security.qemuUser: root does without',
  );
}

export async function doctor(services: ApiServices): Promise<DoctorCheck[]> {
  const inventory = await services.agent.inventory.inventory();
  const peers = services.peers.names.map((name) => [`peer ${name}`, peer(services, name)] as const);
  const checks: readonly (readonly [string, Verdict | Promise<Verdict>])[] = [
    ['kernel', kernel(release())],
    ['userfaultfd', userfaultfd(inventory)],
    ['minor faults', minorFaults(inventory)],
    ['forks', forks(release())],
    ['pushes', pushes(inventory)],
    [
      'preload',
      inventory.isPreloadPresent
        ? ok('present')
        : fail('libvmigrate-preload.so is missing', 'build it: npm run build:native'),
    ],
    ['containment', containment(inventory.containmentProblem)],
    ['QEMU', qemu(inventory.qemuVersion, inventory.qemuProblem)],
    [
      'machines',
      inventory.machines.length > 0
        ? ok(`${inventory.machines.length} machine types`)
        : fail('QEMU reports none', 'install qemu-system-x86'),
    ],
    ['KVM', kvm(inventory)],
    ['guest memory', ramFiles(inventory)],
    ['state directory', stateRoom(inventory)],
    ['huge pages', hugePages(inventory)],
    ...limitChecks(inventory.limits),
    ['data security', dataSecurity(inventory)],
    ['memlock', memlock(inventory.rdma)],
    ['memory cgroup', cgroup(inventory.rdma)],
    ['certificate', certificate(services)],
    ['RDMA', rdma(inventory.rdma)],
    ...inventory.rdma.devices.map((device) => [`RDMA ${device.name}`, rdmaDevice(device)] as const),
    ...peers,
    ['multicast', multicastVerdict(services, 'udp')],
    ...(inventory.rdma.address === null ? [] : [['RDMA multicast', multicastVerdict(services, 'verbs')] as const]),
  ];
  return Promise.all(checks.map(async ([name, verdict]) => ({ name, ...(await verdict) })));
}

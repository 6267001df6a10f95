/** Implements VmProcess for a VM that QEMU runs: each call as QMP commands. */
import { type MigrationError, toMigrationError } from '../../domain/errors.js';
import type { MigrationMode } from '../../domain/migration.js';
import type {
  ConnectedState,
  FileLoad,
  GuestAgentLink,
  LaunchOrder,
  LoadState,
  NativeMoveOrder,
  NicOrder,
  OpenStream,
  StartedVm,
  StateExport,
  StateImport,
  VmFacts,
  VmListener,
  VmProcess,
} from '../backend.js';
import type { VmDisks } from '../vm-disks.js';
import type { QemuConnection } from './connection.js';
import { QemuDisks } from './disks.js';
import { QemuFacts } from './facts.js';
import { loadState, prepareFile, QemuFileLoad, runLoaded } from './file-load.js';
import { GuestAgent } from './guest-agent.js';
import { EXIT_BYTES_MAX, EXIT_CHARDEV, EXIT_DEVICE } from './identity-devices.js';
import { IncomingState } from './incoming-state.js';
import { launch } from './launch.js';
import { untilKept } from './launcher/launcher.js';
import { cancelAndRun, cancelMigration, nativeMove, nativeReading, nativeRecover } from './native-migration.js';
import { replaceNics } from './nic-replace.js';
import { OutgoingState } from './outgoing-state.js';
import type { QmpClient, QmpEvent } from './qmp/client.js';
import { withOutput } from './start.js';

const CONNECT_TIMEOUT_MS = 5_000;
/** QEMU's shutdown reason if the guest has powered itself off. */
const POWERED_OFF = 'guest-shutdown';
/** Our word for the end of a guest whose kernel has reported a panic (pvpanic). */
const PANICKED = 'panicked';
const OUTPUT_KEPT_MS = 1_000;
/** The announcement is repeated in case one is lost. */
const ANNOUNCE = { initial: 50, max: 550, rounds: 5, step: 100 } as const;

export class QemuProcess implements VmProcess {
  readonly facts: VmFacts;
  readonly disks: VmDisks;
  readonly #connection: QemuConnection;
  readonly #programs: { readonly program: string; readonly hasLauncher: boolean };

  constructor(connection: QemuConnection, programs: { program: string; hasLauncher: boolean }) {
    this.#connection = connection;
    this.#programs = programs;
    this.facts = new QemuFacts(connection);
    this.disks = new QemuDisks(connection);
  }

  /** Tests use it for queries that VmProcess does not have. Throws QEMU_GONE while there is no connection. */
  get qmp(): QmpClient {
    return this.#connection.qmp;
  }

  launch(order: LaunchOrder): Promise<StartedVm> {
    return launch(this.#connection, this.#programs, order);
  }

  async connect(): Promise<ConnectedState> {
    const client = await this.#connection.open({ timeoutMs: CONNECT_TIMEOUT_MS });
    try {
      const { running, status } = await client.execute('query-status');
      if (status === 'shutdown') return 'shutdown';
      if (status === 'guest-panicked') return PANICKED;
      return running ? 'running' : 'paused';
    } catch (error) {
      client.close();
      throw error;
    }
  }

  async connected(): Promise<void> {
    await this.#connection.connected();
  }

  follow(listener: VmListener): void {
    const { latest } = this.#connection;
    latest?.on('event', (event) => tell(listener, event));
    latest?.onClosed(() => listener.onLost());
  }

  close(): void {
    this.#connection.close();
  }

  async run(): Promise<void> {
    await this.qmp.execute('cont');
  }

  async pause(): Promise<void> {
    await this.qmp.execute('stop');
  }

  async powerdown(): Promise<void> {
    await this.qmp.execute('system_powerdown');
  }

  async reset(): Promise<void> {
    await this.qmp.execute('system_reset');
  }

  async takeExitText(): Promise<{ text: string; isOpen: boolean }> {
    const chardevs = await this.qmp.execute('query-chardev');
    const port = chardevs.find(({ label }) => label === EXIT_CHARDEV);
    if (port === undefined) return { text: '', isOpen: false };
    const order = { device: EXIT_CHARDEV, size: EXIT_BYTES_MAX, format: 'base64' } as const;
    const text = Buffer.from(await this.qmp.execute('ringbuf-read', order), 'base64').toString('latin1');
    return { text, isOpen: port['frontend-open'] };
  }

  outputKept(): Promise<void> {
    return untilKept(this.#connection.place.directory, OUTPUT_KEPT_MS);
  }

  async quit(): Promise<void> {
    await this.qmp.execute('quit');
  }

  explain(error: unknown): Promise<MigrationError> {
    return withOutput(this.#connection.place, toMigrationError(error));
  }

  replaceNics(order: NicOrder): Promise<void> {
    return replaceNics(this.#connection, order);
  }

  guestAgent(timeoutMs: number): Promise<GuestAgentLink> {
    return GuestAgent.connect(this.#connection.place.agentPath, timeoutMs);
  }

  async announce(): Promise<void> {
    await this.qmp.execute('announce-self', ANNOUNCE);
  }

  exportState(): Promise<StateExport> {
    return OutgoingState.listen(this.#connection);
  }

  importState(mode: MigrationMode, isReattached: boolean): StateImport {
    return new IncomingState(this.#connection, mode, isReattached);
  }

  prepareFile(): Promise<void> {
    return prepareFile(this.#connection);
  }

  loadFile(): FileLoad {
    return new QemuFileLoad(this.#connection);
  }

  loadState(): Promise<LoadState> {
    return loadState(this.#connection);
  }

  runLoaded(): Promise<void> {
    return runLoaded(this.#connection);
  }

  async nativeMove(order: NativeMoveOrder): Promise<void> {
    await nativeMove(this.#connection, order);
  }

  async nativeRecover(open: OpenStream): Promise<void> {
    await nativeRecover(this.#connection, open);
  }

  async nativeReading(): Promise<Readonly<Record<string, number | string>>> {
    return nativeReading(await this.#connection.connected());
  }

  async cancelMove(): Promise<void> {
    await cancelMigration(await this.#connection.connected());
  }

  async cancelAndRun(): Promise<void> {
    await cancelAndRun(await this.#connection.connected());
  }
}

function tell(listener: VmListener, { name, data }: QmpEvent): void {
  const reason = data['reason'];
  if (name === 'SHUTDOWN' && typeof reason === 'string') listener.onShutdown(reason, reason === POWERED_OFF);
  else if (name === 'GUEST_PANICKED') listener.onShutdown(PANICKED, false);
  else if (name === 'VSERPORT_CHANGE' && data['id'] === EXIT_DEVICE) listener.onExitPort();
  else if (name === 'STOP') listener.onRunState('paused');
  else if (name === 'RESUME') listener.onRunState('running');
}

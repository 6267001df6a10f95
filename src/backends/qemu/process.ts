/** Implements VmProcess for a VM that QEMU runs: each call as QMP commands. */
import { type MigrationError, toMigrationError } from '../../domain/errors.js';
import type { MigrationMode } from '../../domain/migration.js';
import type {
  FileLoad,
  GuestAgentLink,
  LaunchOrder,
  NativeMoveOrder,
  NicOrder,
  RunState,
  StartedVm,
  StateExport,
  StateImport,
  VmDisks,
  VmFacts,
  VmListener,
  VmProcess,
} from '../backend.js';
import type { QemuConnection } from './connection.js';
import { QemuDisks } from './disks.js';
import { QemuFacts } from './facts.js';
import { prepareFile, QemuFileLoad } from './file-load.js';
import { GuestAgent } from './guest-agent.js';
import { IncomingState } from './incoming-state.js';
import { launch } from './launch.js';
import { cancelAndRun, cancelMigration, nativeMove, nativeReading } from './native-migration.js';
import { replaceNics } from './nic-replace.js';
import { OutgoingState } from './outgoing-state.js';
import type { QmpClient, QmpEvent } from './qmp/client.js';
import { withOutput } from './start.js';

const CONNECT_TIMEOUT_MS = 5_000;
/** QEMU's shutdown reason if the guest has powered itself off. */
const POWERED_OFF = 'guest-shutdown';
/** The announcement is repeated in case one is lost. */
const ANNOUNCE = { initial: 50, max: 550, rounds: 5, step: 100 } as const;

export class QemuProcess implements VmProcess {
  readonly facts: VmFacts;
  readonly disks: VmDisks;
  readonly #connection: QemuConnection;
  readonly #program: string;

  constructor(connection: QemuConnection, program: string) {
    this.#connection = connection;
    this.#program = program;
    this.facts = new QemuFacts(connection);
    this.disks = new QemuDisks(connection);
  }

  /** Tests use it for queries that VmProcess does not have. Throws QEMU_GONE while there is no connection. */
  get qmp(): QmpClient {
    return this.#connection.qmp;
  }

  launch(order: LaunchOrder): Promise<StartedVm> {
    return launch(this.#connection, this.#program, order);
  }

  async connect(): Promise<RunState> {
    const client = await this.#connection.open({ timeoutMs: CONNECT_TIMEOUT_MS });
    try {
      const { running } = await client.execute('query-status');
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

  async quit(): Promise<void> {
    await this.qmp.execute('quit');
  }

  explain(error: unknown): Promise<MigrationError> {
    return withOutput(this.#connection.place.outputPath, toMigrationError(error));
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

  async nativeMove(order: NativeMoveOrder): Promise<void> {
    await nativeMove(this.qmp, order);
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
  else if (name === 'STOP') listener.onRunState('paused');
  else if (name === 'RESUME') listener.onRunState('running');
}

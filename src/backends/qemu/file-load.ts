/**
 * Loads the state of an image into a clone's QEMU, from a descriptor that QEMU was started with. A load takes two
 * commands and two events. Nothing is polled.
 */
import { MigrationError } from '../../domain/errors.js';
import type { FileLoad, LoadState } from '../backend.js';
import type { QemuConnection } from './connection.js';
import { configureIncoming } from './migration.js';
import { MigrationWatch } from './migration-watch.js';
import type { QmpClient } from './qmp/client.js';

/** The first descriptor after stdin, stdout and stderr (start.ts, `inputPaths`). */
const STATE_URI = 'fd:3';
const LOAD_TIMEOUT_MS = 60_000;
const RESUME_TIMEOUT_MS = 30_000;

/**
 * QEMU reads its monitor byte by byte, so commands that can be sent early are not sent while a user waits for clones.
 */
export async function prepareFile({ qmp }: QemuConnection): Promise<void> {
  await configureIncoming(qmp, ['events', 'x-ignore-shared', 'late-block-activate']);
}

export async function loadState(connection: QemuConnection): Promise<LoadState> {
  return stateBy(await connection.connected());
}

export async function runLoaded(connection: QemuConnection): Promise<void> {
  const qmp = await connection.connected();
  const watch = new MigrationWatch(qmp);
  try {
    const state = await stateBy(qmp);
    if (state === 'waiting') {
      throw new MigrationError('CONFLICT', `the device state of ${connection.place.name} is not loaded`);
    }
    if (state === 'loaded') await run(qmp, watch);
  } finally {
    watch.end();
  }
}

export class QemuFileLoad implements FileLoad {
  readonly #connection: QemuConnection;
  readonly #watch: MigrationWatch;

  constructor(connection: QemuConnection) {
    this.#connection = connection;
    this.#watch = new MigrationWatch(connection.qmp);
  }

  async loaded(): Promise<void> {
    await this.#connection.qmp.execute('migrate-incoming', { uri: STATE_URI });
    await this.#watch.reached('completed', LOAD_TIMEOUT_MS);
  }

  async run(): Promise<void> {
    await run(this.#connection.qmp, this.#watch);
  }

  end(): void {
    this.#watch.end();
  }
}

/** After a load QEMU is `paused`, because it was started with -S. Nobody pauses a clone that has not run. */
async function stateBy(qmp: QmpClient): Promise<LoadState> {
  const { status } = await qmp.execute('query-status');
  if (status === 'inmigrate') return 'waiting';
  return status === 'paused' ? 'loaded' : 'hasRun';
}

async function run(qmp: QmpClient, watch: MigrationWatch): Promise<void> {
  const resumed = watch.resumed(RESUME_TIMEOUT_MS);
  await Promise.race([resumed, qmp.execute('cont').then(() => resumed)]);
}

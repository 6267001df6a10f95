/**
 * Loads the state of an image into a clone's QEMU, from a descriptor that QEMU was started with. A load takes two
 * commands and two events. Nothing is polled.
 */
import type { FileLoad } from '../backend.js';
import type { QemuConnection } from './connection.js';
import { configureIncoming } from './migration.js';
import { MigrationWatch } from './migration-watch.js';

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
    const resumed = this.#watch.resumed(RESUME_TIMEOUT_MS);
    await Promise.race([resumed, this.#connection.qmp.execute('cont').then(() => resumed)]);
  }

  end(): void {
    this.#watch.end();
  }
}

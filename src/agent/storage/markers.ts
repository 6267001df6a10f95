/**
 * Markers: small files with a secret that the source of a move leaves beside a VM's disks. A target that reads the
 * secret under the same path sees the same directory. A marker is removed when its proof ends, after a deadline, or at
 * the next start of the daemon: a record of its place is durable before the marker exists. One that stays all the same
 * says in its text that it may be deleted.
 */
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import { lstat, open, unlink } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { z } from 'zod';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { RecordFiles, type RecordKind } from '../../durable/record-files.js';
import type { Log } from '../../kit/log.js';
import { proofId } from '../../schemas/storage.js';

const PREFIX = '.vmigrate-storage-check-';
const TEXT = 'vmigrate compares the storage of two hosts by this file. If it stays, it may be deleted.\n';
const SECRET_BYTES = 16;
const MARKER_BYTES_MAX = 512;
/** A check takes seconds. After this time its coordinator has given up, or has died. */
const LIFETIME_MS = 120_000;
const PROOFS_MAX = 64;

const record = z.strictObject({ version: z.literal(1), proof: proofId, paths: z.array(z.string().max(4096)).max(256) });
type MarkerRecord = z.output<typeof record>;
export const MARKER_RECORD: RecordKind<MarkerRecord> = {
  ...{ what: 'record of markers', version: 1, schema: record },
  nameOf: ({ proof }) => proof,
};

/** Returns the path of a proof's marker beside a file. */
export function markerPath(proof: string, filePath: string): string {
  return join(dirname(filePath), `${PREFIX}${proof}`);
}

/** Returns the secret in the marker, or null if there is no such marker here. It opens nothing but a short file. */
export async function readMarker(path: string): Promise<string | null> {
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const file = await open(path, flags).catch(() => null);
  if (file === null) return null;
  try {
    const stat = await file.stat();
    if (!stat.isFile() || stat.size > MARKER_BYTES_MAX) return null;
    return /^[0-9a-f]{32}$/m.exec(await file.readFile('utf8'))?.[0] ?? null;
  } finally {
    await file.close();
  }
}

interface Proof {
  readonly record: MarkerRecord;
  readonly deadline: NodeJS.Timeout;
}

export class Markers {
  readonly #files: RecordFiles<MarkerRecord>;
  readonly #log: Log;
  readonly #proofs = new Map<string, Proof>();
  /** Resolves when what an earlier daemon has left has been looked at. It never rejects. */
  swept: Promise<void> = Promise.resolve();

  private constructor(files: RecordFiles<MarkerRecord>, log: Log) {
    this.#files = files;
    this.#log = log;
  }

  /**
   * Begins to remove the markers that an earlier daemon has left. A marker that cannot be removed is tried again at the
   * next start. Nobody waits for it: a marker may be on storage that does not answer.
   */
  static async open(stateDir: string, log: Log): Promise<Markers> {
    const files = await RecordFiles.open<MarkerRecord>(stateDir, 'storage-checks', MARKER_RECORD);
    const markers = new Markers(files, log);
    const { records, corrupt } = await files.load();
    for (const error of corrupt) log.warn({ err: error }, 'a record of markers cannot be read');
    markers.swept = Promise.all(records.map((left) => markers.#remove(left))).then(() => undefined);
    return markers;
  }

  /**
   * Writes a marker beside each of the files, one in a directory. Returns the secret, and why directories have none.
   * Throws CONFLICT if too many proofs are under way.
   */
  async leave(
    proof: string,
    filePaths: readonly string[],
  ): Promise<{ readonly secret: string; readonly problems: ReadonlyMap<string, string> }> {
    if (this.#proofs.size >= PROOFS_MAX)
      throw new MigrationError('CONFLICT', `${PROOFS_MAX} checks of storage are under way`, { isRetryable: true });
    const secret = randomBytes(SECRET_BYTES).toString('hex');
    const paths = [...new Set(filePaths.map((path) => markerPath(proof, path)))];
    const problems = new Map<string, string>();
    if (paths.length === 0) return { secret, problems };
    const kept: MarkerRecord = { version: 1, proof, paths };
    const deadline = setTimeout(() => void this.end(proof), LIFETIME_MS);
    deadline.unref();
    this.#proofs.set(proof, { record: kept, deadline });
    try {
      await this.#files.save(kept);
      for (const path of paths) {
        await write(path, secret).catch((error: unknown) => problems.set(path, toMigrationError(error).message));
      }
    } catch (error) {
      await this.end(proof);
      throw error;
    }
    return { secret, problems };
  }

  /** Removes the markers of a proof. Idempotent. It never throws: what stays is removed at the next start. */
  async end(proof: string): Promise<void> {
    const known = this.#proofs.get(proof);
    if (known === undefined) return;
    this.#proofs.delete(proof);
    clearTimeout(known.deadline);
    await this.#remove(known.record);
  }

  async close(): Promise<void> {
    await Promise.all([...this.#proofs.keys()].map((proof) => this.end(proof)));
  }

  async #remove({ proof, paths }: MarkerRecord): Promise<void> {
    let isGone = true;
    for (const path of paths) {
      try {
        // The record may be damaged, and must not remove anything else.
        if (path !== markerPath(proof, path) || !(await lstat(path)).isFile()) continue;
        await unlink(path);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'ENOENT') continue;
        isGone = false;
        this.#log.warn({ path, err: toMigrationError(error) }, 'a marker beside a disk cannot be removed');
      }
    }
    if (!isGone) return;
    await this.#files.remove(proof).catch((error: unknown) => {
      this.#log.warn({ proof, err: toMigrationError(error) }, 'the record of a marker cannot be removed');
    });
  }
}

/** A file of that name is never opened, whoever has made it. */
async function write(path: string, secret: string): Promise<void> {
  const file = await open(
    path,
    constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW,
    0o600,
  );
  try {
    await file.writeFile(`${TEXT}${secret}\n`);
  } finally {
    await file.close();
  }
}

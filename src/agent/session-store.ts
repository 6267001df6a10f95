/**
 * What a host must know of its migration sessions to take them up again after a restart: one JSON file for each session and role. They hold
 * the session's token, so they are readable by the daemon's user alone.
 *
 * That a VM has been resumed here is NOT read from these files: the owner record in the registry says so, and it is the only thing that has to
 * be durable between commit and the first instruction of the guest. `state` may lag behind it.
 */
import { mkdir, readdir, readFile, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import type { Transport } from '../domain.js';
import type { PrepareRequest, SourceEndpointInfo } from '../engine/ports.js';
import { MigrationError } from '../errors.js';
import { syncDirectory, writeDurably } from './durable-file.js';
import { vmSpecSchema } from './spec.js';

/**
 * preparing: QEMU is being started, nothing of it is worth keeping · prepared: can be connected and loaded · resumed: the VM has run here,
 * pages may be missing · complete: every page is here
 */
export type TargetRecordState = 'preparing' | 'prepared' | 'resumed' | 'complete';

export interface TargetRecord extends PrepareRequest {
  readonly version: 1;
  readonly role: 'target';
  readonly state: TargetRecordState;
  readonly nativeUri: string | null;
  /** Where the pages are, as the coordinator said last. The keys in it die with the source's daemon. */
  readonly endpoint: SourceEndpointInfo | null;
}

export interface SourceRecord {
  readonly version: 1;
  readonly role: 'source';
  readonly session: string;
  readonly vm: string;
  readonly token: string;
  readonly transport: Transport;
  readonly target: string;
}

export type SessionRecord = TargetRecord | SourceRecord;

const sessionId = z.string().regex(/^[0-9a-f]{32}$/);
const token = z.string().regex(/^[0-9a-f]{64}$/);
const transport = z.enum(['tcp', 'shm', 'rdma']);

const endpoint = z.strictObject({
  transport,
  host: z.string(),
  port: z.int().min(0).max(65535),
  keys: z.array(z.strictObject({ ram: z.string(), dataMap: z.string() })),
});

const recordSchema = z.discriminatedUnion('role', [
  z.strictObject({
    version: z.literal(1),
    role: z.literal('target'),
    session: sessionId,
    job: z.string(),
    spec: vmSpecSchema,
    source: z.string(),
    epoch: z.int().min(0),
    mode: z.enum(['postcopy', 'native-precopy', 'native-postcopy']),
    accel: z.enum(['kvm', 'tcg']),
    token,
    bandwidthBytesPerS: z.number().min(0),
    state: z.enum(['preparing', 'prepared', 'resumed', 'complete']),
    nativeUri: z.string().nullable(),
    endpoint: endpoint.nullable(),
  }),
  z.strictObject({
    version: z.literal(1),
    role: z.literal('source'),
    session: sessionId,
    vm: z.string(),
    token,
    transport,
    target: z.string(),
  }),
]);

/** A session id names a file, and it comes from a peer. */
export function checkSession(session: string): void {
  if (!sessionId.safeParse(session).success) throw new MigrationError('USAGE', 'a session id is 32 hex digits');
}

export class SessionStore {
  readonly #directory: string;
  /** The last write of each file, so that two of them never run at once and the newer record stays. */
  readonly #writes = new Map<string, Promise<void>>();

  private constructor(directory: string) {
    this.#directory = directory;
  }

  static async open(stateDir: string): Promise<SessionStore> {
    const directory = join(stateDir, 'sessions');
    await mkdir(directory, { recursive: true, mode: 0o700 });
    return new SessionStore(directory);
  }

  /** Durable when it resolves. */
  save(record: SessionRecord): Promise<void> {
    return this.#enqueue(record, (path) => writeDurably(path, `${JSON.stringify(record, null, 2)}\n`));
  }

  /** No such file is fine. */
  remove(record: Pick<SessionRecord, 'session' | 'role'>): Promise<void> {
    return this.#enqueue(record, async (path) => {
      await unlink(path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
      });
      await syncDirectory(this.#directory);
    });
  }

  /** All sessions on disk. A file that is not ours to understand is reported and left alone, so that it does not keep the others from service. */
  async load(): Promise<{ records: SessionRecord[]; corrupt: MigrationError[] }> {
    const records: SessionRecord[] = [];
    const corrupt: MigrationError[] = [];
    for (const name of await readdir(this.#directory)) {
      if (!name.endsWith('.json')) continue;
      const path = join(this.#directory, name);
      try {
        const record = recordSchema.parse(JSON.parse(await readFile(path, 'utf8')));
        if (this.#path(record) !== path) throw new Error('its name is not that of its session');
        records.push(record);
      } catch (cause) {
        corrupt.push(new MigrationError('CORRUPT', `${path} is not a session record`, { cause }));
      }
    }
    return { records, corrupt };
  }

  #path({ session, role }: Pick<SessionRecord, 'session' | 'role'>): string {
    return join(this.#directory, `${session}.${role}.json`);
  }

  #enqueue(record: Pick<SessionRecord, 'session' | 'role'>, change: (path: string) => Promise<void>): Promise<void> {
    checkSession(record.session);
    const path = this.#path(record);
    const before = this.#writes.get(path) ?? Promise.resolve();
    const done = before.then(
      () => change(path),
      () => change(path),
    );
    this.#writes.set(path, done);
    const forget = () => {
      if (this.#writes.get(path) === done) this.#writes.delete(path);
    };
    done.then(forget, forget);
    return done;
  }
}

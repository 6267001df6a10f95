/**
 * What a host must know of its migration sessions to take them up again after a restart: one JSON file for each session
 * and role. They hold the session's token, so they are readable by the daemon's user alone.
 *
 * That a VM has been resumed here is NOT read from these files: the owner record in the registry says so, and it is the
 * only thing that has to be durable between commit and the first instruction of the guest. `state` may lag behind it.
 */

import { join } from 'node:path';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { Transport } from '../../domain/transport.js';
import { RecordFiles } from '../../durable/record-files.js';
import type { PrepareRequest, SourceEndpointInfo } from '../../engine/ports/session.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { accel, migrationMode, sessionId, sessionToken, transport } from '../../schemas/words.js';

/**
 * preparing: QEMU is being started, nothing of it is worth keeping · prepared: can be connected and loaded · resumed:
 * the VM has run here, pages may be missing · complete: every page is here
 */
const TARGET_RECORD_STATES = ['preparing', 'prepared', 'resumed', 'complete'] as const;
export type TargetRecordState = (typeof TARGET_RECORD_STATES)[number];

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
    mode: migrationMode,
    accel,
    token: sessionToken,
    bandwidthBytesPerS: z.number().min(0),
    state: z.enum(TARGET_RECORD_STATES),
    nativeUri: z.string().nullable(),
    endpoint: endpoint.nullable(),
  }),
  z.strictObject({
    version: z.literal(1),
    role: z.literal('source'),
    session: sessionId,
    vm: z.string(),
    token: sessionToken,
    transport,
    target: z.string(),
  }),
]);

/** A session id names a file, and it comes from a peer. */
export function checkSession(session: string): void {
  if (!sessionId.safeParse(session).success) throw new MigrationError('USAGE', 'a session id is 32 hex digits');
}

export class SessionStore {
  readonly #files: RecordFiles<SessionRecord>;

  private constructor(files: RecordFiles<SessionRecord>) {
    this.#files = files;
  }

  static async open(stateDir: string): Promise<SessionStore> {
    const kind = { what: 'session record', schema: recordSchema, nameOf: fileName };
    return new SessionStore(await RecordFiles.open<SessionRecord>(join(stateDir, 'sessions'), kind));
  }

  /** Durable when it resolves. */
  save(record: SessionRecord): Promise<void> {
    return this.#files.save(record);
  }

  /** No such file is fine. */
  remove(record: Pick<SessionRecord, 'session' | 'role'>): Promise<void> {
    return this.#files.remove(fileName(record));
  }

  /** All sessions on disk; a file that is not ours to understand is reported and left alone. */
  load(): Promise<{ records: SessionRecord[]; corrupt: MigrationError[] }> {
    return this.#files.load();
  }
}

function fileName({ session, role }: Pick<SessionRecord, 'session' | 'role'>): string {
  checkSession(session);
  return `${session}.${role}`;
}

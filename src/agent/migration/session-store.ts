/**
 * The records of a host's migration sessions, by which a restarted daemon resumes them: one JSON file per session and
 * role. They contain the session's token, so only the daemon's user can read them.
 *
 * These files do NOT decide whether a VM has been resumed on this host. The owner record in the registry decides that,
 * and it is the only write that must be durable between the commit and the guest's first instruction. `state` may lag
 * behind it.
 */

import { z } from 'zod';
import { DATA_SECURITIES } from '../../domain/data-security.js';
import { MigrationError } from '../../domain/errors.js';
import type { Transport } from '../../domain/transport.js';
import { RecordFiles, type RecordKind } from '../../durable/record-files.js';
import type { PrepareRequest, SourceEndpointInfo } from '../../engine/ports/session.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { accel, incarnationId, migrationMode, sessionId, sessionToken, transport } from '../../schemas/words.js';

/**
 * preparing: QEMU is being started, and nothing of it is kept after a crash · prepared: the VM can be connected and
 * loaded · resumed: the VM has run on this host, and pages may be missing · complete: every page has arrived
 */
const TARGET_RECORD_STATES = ['preparing', 'prepared', 'resumed', 'complete'] as const;
export type TargetRecordState = (typeof TARGET_RECORD_STATES)[number];

export interface TargetRecord extends PrepareRequest {
  readonly version: 1;
  readonly role: 'target';
  readonly state: TargetRecordState;
  /** Null. Earlier builds need it. */
  readonly nativeUri: string | null;
  /** The latest endpoint of the source from the coordinator. Its keys become invalid when the source's daemon ends. */
  readonly endpoint: SourceEndpointInfo | null;
  /** When the session began, and when the VM ran here first. Sessions of earlier builds have neither. */
  readonly preparedAt?: string;
  readonly resumedAt?: string;
}

export interface SourceRecord {
  readonly version: 1;
  readonly role: 'source';
  readonly session: string;
  readonly vm: string;
  readonly token: string;
  readonly transport: Transport;
  readonly target: string;
  /** The kernel notes what the VM writes while its memory is fetched. Absent: it does not. */
  readonly isTracked?: boolean;
}

export type SessionRecord = TargetRecord | SourceRecord;

const endpoint = z.strictObject({
  transport,
  host: z.string(),
  port: z.int().min(0).max(65535),
  keys: z.array(z.strictObject({ ram: z.string(), dataMap: z.string(), dirtyMap: z.string().exactOptional() })),
  dataSecurity: z.enum(DATA_SECURITIES).exactOptional(),
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
    incarnation: incarnationId.exactOptional(),
    mode: migrationMode,
    accel,
    token: sessionToken,
    bandwidthBytesPerS: z.number().min(0),
    memoryKey: sessionToken.exactOptional(),
    state: z.enum(TARGET_RECORD_STATES),
    nativeUri: z.string().nullable(),
    endpoint: endpoint.nullable(),
    preparedAt: z.string().exactOptional(),
    resumedAt: z.string().exactOptional(),
  }),
  z.strictObject({
    version: z.literal(1),
    role: z.literal('source'),
    session: sessionId,
    vm: z.string(),
    token: sessionToken,
    transport,
    target: z.string(),
    isTracked: z.boolean().exactOptional(),
  }),
]);

/** Throws USAGE for an invalid session id. Ids come from peers, and files are named after them. */
export function checkSession(session: string): void {
  if (!sessionId.safeParse(session).success) throw new MigrationError('USAGE', 'a session id must be 32 hex digits');
}

export class SessionStore {
  readonly #files: RecordFiles<SessionRecord>;

  private constructor(files: RecordFiles<SessionRecord>) {
    this.#files = files;
  }

  static async open(stateDir: string): Promise<SessionStore> {
    return new SessionStore(await RecordFiles.open<SessionRecord>(stateDir, 'sessions', SESSION_RECORD));
  }

  /** Durable when it resolves. */
  save(record: SessionRecord): Promise<void> {
    return this.#files.save(record);
  }

  /** Does nothing if there is no such file. */
  remove(record: Pick<SessionRecord, 'session' | 'role'>): Promise<void> {
    return this.#files.remove(fileName(record));
  }

  /** Returns all sessions on disk. A file that cannot be read is reported in `corrupt` and left as it is. */
  load(): Promise<{ records: SessionRecord[]; corrupt: MigrationError[] }> {
    return this.#files.load();
  }
}

function fileName({ session, role }: Pick<SessionRecord, 'session' | 'role'>): string {
  checkSession(session);
  return `${session}.${role}`;
}

export const SESSION_RECORD: RecordKind<SessionRecord> = {
  what: 'session record',
  schema: recordSchema,
  version: 1,
  nameOf: fileName,
};

/**
 * Bearer tokens: secrets by which clients without a certificate use the API of this host. A token is shown once, when
 * it is made. Only its SHA-256 is kept, in a record of the state directory: the secret has 256 random bits, so that its
 * hash needs neither salt nor stretching.
 *
 *   vmg_ID_SECRET      ID: 12 hex digits, which name the record. SECRET: 32 bytes in base64url.
 */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import { z } from 'zod';
import { USER_ROLES, type UserRole } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';
import type { TokenView } from '../domain/token.js';
import { RecordFiles, type RecordKind } from '../durable/record-files.js';

const ID = /^[0-9a-f]{12}$/;
const TOKEN = /^vmg_([0-9a-f]{12})_([A-Za-z0-9_-]{43})$/;
/** All are in memory. */
const TOKENS_MAX = 1024;
/** The longest time that a timer of Node can wait. */
const TIMER_MS_MAX = 2 ** 31 - 1;

interface TokenRecord extends TokenView {
  readonly version: 1;
  /** SHA-256 of the secret, in hex. */
  readonly hash: string;
}

const schema: z.ZodType<TokenRecord> = z.strictObject({
  version: z.literal(1),
  id: z.string().regex(ID),
  name: z.string().min(1).max(64),
  role: z.enum(USER_ROLES),
  createdAt: z.iso.datetime(),
  createdBy: z.string().max(128),
  expiresAt: z.iso.datetime(),
  hash: z.string().regex(/^[0-9a-f]{64}$/),
});

export const TOKEN_RECORD: RecordKind<TokenRecord> = {
  what: 'token record',
  schema,
  version: 1,
  nameOf: ({ id }) => id,
};

export interface TokenOrder {
  readonly name: string;
  readonly role: UserRole;
  readonly expiresInMs: number;
  readonly createdBy: string;
}

export class Tokens {
  readonly #files: RecordFiles<TokenRecord>;
  readonly #byId: Map<string, TokenRecord>;
  readonly #listeners = new Set<() => void>();
  #expiry: NodeJS.Timeout | undefined;
  /** The ids of tokens that are worthless already, and whose files may not be removed yet. */
  readonly #revoked = new Set<string>();
  /** The names of tokens that are about to be written. */
  readonly #coming = new Set<string>();

  private constructor(files: RecordFiles<TokenRecord>, records: readonly TokenRecord[]) {
    this.#files = files;
    this.#byId = new Map(records.map((record) => [record.id, record]));
    this.#awaitExpiry();
  }

  /** A record that cannot be read is reported, and its token is worthless. */
  static async open(stateDir: string, onCorrupt: (error: MigrationError) => void): Promise<Tokens> {
    const files = await RecordFiles.open<TokenRecord>(stateDir, 'tokens', TOKEN_RECORD);
    const { records, corrupt } = await files.load();
    for (const error of corrupt) onCorrupt(error);
    return new Tokens(files, records);
  }

  /** False: nobody can come with a token now. */
  get isAnyValid(): boolean {
    const nowMs = Date.now();
    return [...this.#byId.values()].some((record) => this.#isValid(record, nowMs));
  }

  /** The oldest first, also those that have expired. */
  list(): TokenView[] {
    return [...this.#byId.values()]
      .sort((a, b) => a.createdAt.localeCompare(b.createdAt) || a.id.localeCompare(b.id))
      .map(viewOf);
  }

  /** The token is durable when this resolves. Throws CONFLICT if the name is taken by one that is valid. */
  async create({ name, role, expiresInMs, createdBy }: TokenOrder): Promise<TokenView & { readonly token: string }> {
    const now = Date.now();
    if (ID.test(name)) throw new MigrationError('USAGE', `${name} looks like the id of a token: choose another name`);
    const isTaken = [...this.#byId.values()].some((other) => other.name === name && this.#isValid(other, now));
    if (isTaken || this.#coming.has(name))
      throw new MigrationError('CONFLICT', `a token named ${name} exists`, {
        remedy: `choose another name, or run "vmctl token revoke ${name}" first`,
      });
    if (this.#byId.size + this.#coming.size >= TOKENS_MAX)
      throw new MigrationError('CONFLICT', `there may be ${TOKENS_MAX} tokens on a host`, {
        remedy: 'revoke those that nobody uses: vmctl token list',
      });
    const id = randomBytes(6).toString('hex');
    const secret = randomBytes(32).toString('base64url');
    const view: TokenView = {
      ...{ id, name, role, createdBy },
      createdAt: new Date(now).toISOString(),
      expiresAt: new Date(now + expiresInMs).toISOString(),
    };
    const record: TokenRecord = { version: 1, ...view, hash: hashOf(secret).toString('hex') };
    this.#coming.add(name);
    try {
      await this.#files.save(record);
      this.#byId.set(id, record);
      this.#awaitExpiry();
    } finally {
      this.#coming.delete(name);
    }
    return { ...view, token: `vmg_${id}_${secret}` };
  }

  /**
   * By name or id. It is worthless at once, and for the next daemon when this resolves; if it fails, it can be
   * repeated. Throws NOT_FOUND if there is none.
   */
  async revoke(nameOrId: string): Promise<TokenView[]> {
    const hit = this.list().filter(({ id, name }) => id === nameOrId || name === nameOrId);
    if (hit.length === 0)
      throw new MigrationError('NOT_FOUND', `no token ${nameOrId} on this host`, { remedy: 'vmctl token list' });
    for (const { id } of hit) this.#revoked.add(id);
    this.#tell();
    await Promise.all(
      hit.map(async ({ id }) => {
        await this.#files.remove(id);
        this.#byId.delete(id);
        this.#revoked.delete(id);
      }),
    );
    return hit;
  }

  #isValid({ id, expiresAt }: TokenRecord, nowMs: number): boolean {
    return Date.parse(expiresAt) > nowMs && !this.#revoked.has(id);
  }

  #tell(): void {
    for (const listener of this.#listeners) listener();
  }

  /** The end of a token's time is like its revocation. */
  #awaitExpiry(): void {
    clearTimeout(this.#expiry);
    const nowMs = Date.now();
    const ends = [...this.#byId.values()].map(({ expiresAt }) => Date.parse(expiresAt)).filter((end) => end > nowMs);
    if (ends.length === 0) return;
    this.#expiry = setTimeout(
      () => {
        this.#tell();
        this.#awaitExpiry();
      },
      Math.min(Math.min(...ends) - nowMs, TIMER_MS_MAX),
    );
    this.#expiry.unref();
  }

  /** Calls `listener` when a token has been revoked or has expired. Returns a function that ends the subscription. */
  onRevoked(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  }

  /** Returns whose token it is, or null if it is not valid (any more). */
  holderOf(token: string): TokenView | null {
    const [, id = '', secret = ''] = TOKEN.exec(token) ?? [];
    const record = this.#byId.get(id);
    if (record === undefined || !this.#isValid(record, Date.now())) return null;
    return timingSafeEqual(Buffer.from(record.hash, 'hex'), hashOf(secret)) ? record : null;
  }
}

/** Without what only the record has. */
function viewOf({ id, name, role, createdAt, createdBy, expiresAt }: TokenRecord): TokenView {
  return { id, name, role, createdAt, createdBy, expiresAt };
}

function hashOf(secret: string): Buffer {
  return createHash('sha256').update(secret).digest();
}

/**
 * The sessions that have been undone or released. A late call for such a session must not restore anything. The list
 * need not survive the daemon, because a call to an earlier daemon cannot arrive any more. It keeps only the latest
 * sessions, because a caller gives up its call within minutes.
 */
import { MigrationError } from '../../domain/errors.js';

const KEPT_MAX = 4096;

export class EndedSessions {
  readonly #sessions = new Set<string>();

  add(session: string): void {
    this.#sessions.add(session);
    const [oldest] = this.#sessions;
    if (this.#sessions.size > KEPT_MAX && oldest !== undefined) this.#sessions.delete(oldest);
  }

  refuse(session: string): void {
    if (this.#sessions.has(session)) throw new MigrationError('CONFLICT', `session ${session.slice(0, 32)} has ended`);
  }
}

/**
 * Sessions that have been undone or released: what arrives late for them must not bring anything back. Only this
 * daemon's life matters, a call made to an earlier one cannot arrive any more; and only the latest, a call is given up
 * by its caller within minutes.
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
    if (this.#sessions.has(session)) throw new MigrationError('CONFLICT', 'the session has ended');
  }
}

import { isFinal, type JobState } from '../domain/job.js';
import { FileLogStore, type LogStore } from '../durable/log-store.js';
import { RecordLog } from '../durable/record-log.js';
import type { Journal, JournalEntry } from '../engine/ports/journal.js';
import { decodeJournalEntry } from '../schemas/journal.js';

/** A journal that can be read again: what JobManager needs. */
export interface ReplayableJournal extends Journal {
  /** Everything known of the jobs that are kept, in the order in which it was written. */
  entries(): readonly JournalEntry[];
}

/** Finished jobs that stay to be listed. */
const FINISHED_JOBS_MAX = 100;
/** Lines that nothing needs any more, before the file is written anew. */
const STALE_LINES_MAX = 2_000;

/**
 * The jobs of this daemon as an append-only file: every act is announced by a line that is durable before the act
 * begins. What is needed of each job is kept in memory too, so that the file can be shortened at any time: all lines of
 * a job under way, of a finished one its first and its last.
 */
export class FileJournal implements ReplayableJournal {
  readonly #log: RecordLog<JournalEntry>;
  readonly #jobs = new Map<string, JournalEntry[]>();

  private constructor(log: RecordLog<JournalEntry>) {
    this.#log = log;
  }

  static async open(path: string): Promise<{ journal: FileJournal; entries: readonly JournalEntry[] }> {
    return FileJournal.on(await FileLogStore.open(path));
  }

  static async on(store: LogStore): Promise<{ journal: FileJournal; entries: readonly JournalEntry[] }> {
    const { log, records } = await RecordLog.open(store, decodeJournalEntry);
    const journal = new FileJournal(log);
    for (const entry of records) journal.#note(entry);
    await journal.#compactIfWorthwhile();
    return { journal, entries: journal.entries() };
  }

  entries(): readonly JournalEntry[] {
    return [...this.#jobs.values()].flat();
  }

  async append(entry: JournalEntry): Promise<void> {
    await this.#log.append(entry, () => this.#note(entry));
    // Nobody waits for it. If it breaks the log, the next append says so.
    if (entry.type === 'state') this.#compactIfWorthwhile().catch(() => undefined);
  }

  async close(): Promise<void> {
    await this.#log.close();
  }

  #note(entry: JournalEntry): void {
    if (isFirst(entry)) {
      this.#jobs.set(entry.job, [entry]);
      return;
    }
    const known = this.#jobs.get(entry.job);
    if (known === undefined) return;
    known.push(entry);
    if (!isOver(known)) return;
    const last = known.findLastIndex(({ type }) => type === 'state');
    this.#jobs.set(
      entry.job,
      known.filter((line, index) => isFirst(line) || index === last),
    );
    this.#forgetOldest();
  }

  #forgetOldest(): void {
    const over = [...this.#jobs].filter(([, entries]) => isOver(entries)).map(([job]) => job);
    for (const job of over.slice(0, Math.max(0, over.length - FINISHED_JOBS_MAX))) this.#jobs.delete(job);
  }

  async #compactIfWorthwhile(): Promise<void> {
    const staleLines = this.#log.lineCount - this.entries().length;
    if (staleLines > STALE_LINES_MAX) await this.#log.rewrite(() => this.entries());
  }
}

function isFirst({ type }: JournalEntry): boolean {
  return type === 'job' || type === 'fork';
}

/** A final state is the last word on a job, unless something of it is still left over. */
function isOver(entries: readonly JournalEntry[]): boolean {
  const last = entries.at(-1);
  if (last === undefined) return false;
  const leftovers = new Set<string>();
  let state: JobState = 'queued';
  for (const entry of entries) {
    if (entry.type === 'state') state = entry.state;
    else if (entry.type === 'leftover') leftovers.add(entry.step);
    else if (entry.type === 'cleared') leftovers.delete(entry.step);
  }
  return isFinal(state) && leftovers.size === 0;
}

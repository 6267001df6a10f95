import { isFinal, type JobState } from '../domain/job.js';
import { FileLogStore, type LogStore } from '../durable/log-store.js';
import { RecordLog } from '../durable/record-log.js';
import type { Journal, JournalEntry } from '../engine/ports/journal.js';
import { decodeJournalEntry } from '../schemas/journal.js';

/** A journal that JobManager can read back. */
export interface ReplayableJournal extends Journal {
  /** All entries of the jobs that are kept, in the order of writing. */
  entries(): readonly JournalEntry[];
}

/** The number of finished jobs that stay listed. */
const FINISHED_JOBS_MAX = 100;
/** The number of obsolete lines that triggers a rewrite of the file. */
const STALE_LINES_MAX = 2_000;

/**
 * The journal of this daemon's jobs, an append-only file. A line announces every action and is durable before the
 * action begins. Memory holds the lines that are still needed, so the file can be compacted at any time: all lines of
 * an unfinished job, and the first and the last state line of a finished job.
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
    // The compaction runs in the background. If it breaks the log, the next append throws.
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

/** Returns whether the job has a final state and no leftovers. Then no further lines follow. */
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

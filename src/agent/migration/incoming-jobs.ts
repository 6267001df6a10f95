/**
 * The jobs that bring VMs to this host, in the words of jobs. The views come from the sessions here alone, so they are
 * right also while the coordinator is away. They are not durable: a restarted daemon lists the jobs whose sessions it
 * has taken up. What a job was in the end, and its report, only its coordinator knows for certain.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { isGuestEnd } from '../../domain/guest-end.js';
import { isFinal, type JobState, type MigrationJobView } from '../../domain/job.js';
import { type StepName, tracksWrites } from '../../domain/migration.js';
import type { Clock } from '../../engine/ports/clock.js';
import { Rate } from '../../kit/rate.js';
import { Subscribers } from '../../kit/subscribers.js';
import type { AgentLog } from '../vm/context.js';
import type { ArrivalView } from './arrival.js';

/** What this file needs of a session. */
export interface IncomingSession {
  arrival(): ArrivalView;
  refresh(): Promise<void>;
  hurry(): void;
}

const POLL_MS = 500;
const ENDED_MAX = 100;
const RECOVERY_MS_MAX = 120_000;

interface Incoming {
  readonly session: IncomingSession;
  readonly rate: Rate;
  view: MigrationJobView;
}

export class IncomingJobs {
  readonly #host: string;
  readonly #clock: Clock;
  readonly #log: AgentLog;
  readonly #recoveryMsMax: number;
  /** By job, in the order of their beginning. Those that have ended are among them until there are too many. */
  readonly #jobs = new Map<string, Incoming>();
  readonly #subscribers: Subscribers<MigrationJobView>;
  #timer: NodeJS.Timeout | null = null;

  constructor(
    { host, clock, log }: { readonly host: string; readonly clock: Clock; readonly log: AgentLog },
    recoveryMsMax = RECOVERY_MS_MAX,
  ) {
    this.#host = host;
    this.#clock = clock;
    this.#log = log;
    this.#recoveryMsMax = recoveryMsMax;
    this.#subscribers = new Subscribers((error) => log.warn({ err: toMigrationError(error) }, 'a subscriber failed'));
  }

  list(): MigrationJobView[] {
    this.#lookAtAll();
    return [...this.#jobs.values()].map(({ view }) => view);
  }

  find(id: string): MigrationJobView | undefined {
    const incoming = this.#jobs.get(id);
    if (incoming !== undefined) this.#look(incoming);
    return incoming?.view;
  }

  /** Connects to the source again at once, if the job waits for its connection. */
  hurry(id: string): void {
    this.#jobs.get(id)?.session.hurry();
  }

  /** Calls `onChange` for each change of one job, or of all ('*'). Returns a function that ends the subscription. */
  subscribe(id: string, onChange: (view: MigrationJobView) => void): () => void {
    return this.#subscribers.add(id, onChange);
  }

  begin(session: IncomingSession): void {
    const rate = new Rate();
    const incoming: Incoming = { session, rate, view: this.#viewOf(session.arrival(), rate) };
    const { id } = incoming.view;
    this.#jobs.delete(id);
    this.#jobs.set(id, incoming);
    this.#forgetOldest();
    this.#subscribers.tell(incoming.view);
    this.#timer ??= setInterval(() => this.#lookAtAll(), POLL_MS).unref();
  }

  /** The coordinator has ended the session: the VM has everything, or (`error`) the move was undone. */
  end(session: IncomingSession, error: MigrationError | null): void {
    const incoming = [...this.#jobs.values()].find((other) => other.session === session);
    if (incoming === undefined) return;
    this.#look(incoming);
    if (isFinal(incoming.view.state)) return;
    const state = error === null ? 'done' : 'failed';
    this.#show(incoming, { ...incoming.view, state, step: null, error: error?.toJSON() ?? null });
  }

  close(): void {
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
  }

  #lookAtAll(): void {
    const live = [...this.#jobs.values()].filter(({ view }) => !isFinal(view.state));
    for (const incoming of live) {
      this.#look(incoming);
      incoming.session.refresh().catch((error: unknown) => {
        this.#log.debug({ job: incoming.view.id, err: toMigrationError(error) }, 'QEMU does not say how far it is');
      });
    }
    if (live.length === 0) this.close();
  }

  #look(incoming: Incoming): void {
    if (isFinal(incoming.view.state)) return;
    this.#show(incoming, this.#viewOf(incoming.session.arrival(), incoming.rate));
  }

  #show(incoming: Incoming, view: MigrationJobView): void {
    const { createdAt, updatedAt } = incoming.view;
    const next = { ...view, createdAt, updatedAt };
    if (JSON.stringify(next) === JSON.stringify(incoming.view)) return;
    incoming.view = { ...next, updatedAt: this.#clock.isoNow() };
    this.#subscribers.tell(incoming.view);
  }

  #viewOf(arrival: ArrivalView, rate: Rate): MigrationJobView {
    const { request, hasRun, preparedAt, pagesTotal, pagesPresent, bytesDone, faultCount } = arrival;
    const state = this.#stateOf(arrival);
    const isLive = state === 'running' && hasRun;
    if (isLive) rate.note(this.#clock.nowMs(), bytesDone);
    const bytesPerS = isLive ? Math.round(rate.bytesPerS) : 0;
    const bytesLeft = (pagesTotal - pagesPresent) * request.spec.memory.pageBytes;
    const secondsLeft = bytesLeft === 0 ? 0 : bytesPerS > 0 ? bytesLeft / bytesPerS : null;
    return {
      kind: 'migrate',
      id: request.job,
      vm: request.spec.name,
      source: request.source,
      target: this.#host,
      coordinator: request.source,
      state,
      step: isFinal(state) ? null : stepOf(arrival),
      isCommitted: hasRun,
      progress:
        arrival.state === null
          ? null
          : { pagesTotal, pagesDone: pagesPresent, bytesDone, bytesPerS, secondsLeft, faultCount },
      error: errorOf(arrival, state),
      report: null,
      createdAt: preparedAt,
      updatedAt: preparedAt,
    };
  }

  #stateOf({ state, hasRun, isStalled, quietMs, error }: ArrivalView): JobState {
    if (state === 'gone') return endedItself(error) ? 'done' : 'lost';
    if (!hasRun || !isStalled) return 'running';
    return quietMs > this.#recoveryMsMax ? 'needsRecovery' : 'recovering';
  }

  #forgetOldest(): void {
    for (const [id, { view }] of this.#jobs) {
      if (this.#jobs.size <= ENDED_MAX) return;
      if (isFinal(view.state)) this.#jobs.delete(id);
    }
  }
}

/** The guest has shut down or panicked by itself, so nothing of it is lost. */
function endedItself(error: MigrationError | null): boolean {
  const { reason } = (error?.details ?? {}) as { reason?: unknown };
  return typeof reason === 'string' && isGuestEnd(reason);
}

function stepOf({ state, hasRun, request }: ArrivalView): StepName {
  if (hasRun && state === 'complete') return request.memoryKey === undefined ? 'releaseSource' : 'verifyMemory';
  if (hasRun) return 'drain';
  if (state === 'loaded') return 'transferState';
  if (state !== 'connected') return 'prepareTarget';
  return tracksWrites(request.mode) ? 'push' : 'connectTarget';
}

function errorOf({ error, request, state: session }: ArrivalView, state: JobState): unknown {
  const { name } = request.spec;
  const { source } = request;
  switch (state) {
    case 'lost':
      return new MigrationError('VM_LOST', `${name} has ended here before all of its memory had come from ${source}`, {
        ...(error === null ? {} : { cause: error }),
      }).toJSON();
    case 'recovering':
    case 'needsRecovery': {
      const isCut = session === 'disconnected' || error === null;
      const text = isCut ? `no pages come from ${source}` : `the page session with ${source} failed`;
      const remedy = isCut ? `check ${source} and the data network; the move then goes on by itself` : error.remedy;
      return new MigrationError(state === 'needsRecovery' ? 'NEEDS_RECOVERY' : (error?.code ?? 'DISCONNECTED'), text, {
        ...(remedy === undefined ? {} : { remedy }),
        ...(error === null ? {} : { cause: error }),
      }).toJSON();
    }
    default:
      return null;
  }
}

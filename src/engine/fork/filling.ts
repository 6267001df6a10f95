/** Watches how the images of a fork fill: that of the root, and those of the hosts that joined. */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { HostFillState, HostProgress } from '../../domain/progress.js';
import { Rate } from '../../kit/rate.js';
import { pause, withDeadline } from '../deadline.js';
import { PollPace } from '../poll.js';
import type { ForkPort, ForkProgress } from '../ports/fork.js';
import { describeProgress, troubleOf } from '../progress.js';
import { noteAdvance, reportTrouble } from '../walk-context.js';
import type { ForkFindings, ForkStepContext } from './context.js';
import { noteEnded, runJoined } from './go.js';
import { type JoinedHost, joinedHosts, namingHost } from './hosts.js';
import { AGENT, parentOf } from './steps.js';

/** The last that is known of one host. */
interface Fill {
  readonly host: string;
  readonly forks: ForkPort;
  /** Null: the root. */
  readonly joined: JoinedHost | null;
  state: HostFillState;
  pagesTotal: number;
  pagesDone: number;
  pageBytes: number;
  counters: Readonly<Record<string, number>>;
  nearBytes: Readonly<Record<string, number>>;
  /** Those of the counters that have been counted. */
  checkedPages: number;
  trouble: MigrationError | null;
}

export class Filling {
  readonly #context: ForkStepContext;
  readonly #root: Fill;
  readonly #joined: readonly Fill[];
  #isRootReleased = false;
  /** Why a host has lost its part. Null: none has, or an earlier life of the daemon knew why. */
  #lastLoss: MigrationError | null = null;

  constructor(context: ForkStepContext) {
    const { record, ports, findings } = context;
    this.#context = context;
    const none = { pagesTotal: 0, pagesDone: 0, counters: {}, nearBytes: {}, checkedPages: 0, trouble: null };
    const empty = { ...none, pageBytes: findings.pageBytes };
    const { counters } = findings;
    this.#root = { host: record.plan.host, forks: ports.forks, joined: null, state: 'filling', ...empty, counters };
    this.#joined = joinedHosts(context).map((joined): Fill => {
      const { host, forks } = joined;
      return { host, forks, joined, state: findings.lost.includes(host) ? 'lost' : 'waiting', ...empty };
    });
  }

  /** Resolves when every host has all of the image, or reads it lazily, or has lost its part. */
  async untilComplete(): Promise<Partial<ForkFindings> | undefined> {
    const { ports, limits, marks, halt, observer } = this.#context;
    const pace = new PollPace(limits);
    const rate = new Rate();
    const fills = [this.#root, ...this.#joined];
    const total = (of: (fill: Fill) => number): number => fills.reduce((sum, fill) => sum + of(fill), 0);
    let checkedPages = 0;
    for (;;) {
      await Promise.all([this.#askRoot(), ...this.#joined.map((fill) => this.#askJoined(fill))]);
      const nowMs = ports.clock.nowMs();
      const pagesDone = total((fill) => fill.pagesDone);
      // A host that has all pages may still check them, and does so from the first one on after a restart.
      checkedPages += total(takeChecked);
      noteAdvance(this.#context, pagesDone + checkedPages, nowMs);
      const bytesDone = total(bytesOf);
      rate.note(nowMs, bytesDone);
      const described = describeProgress({
        ...{ pagesTotal: total((fill) => fill.pagesTotal), pagesDone, pageBytes: pageBytesOf(fills), bytesDone },
        bytesPerS: rate.bytesPerS,
        faultCount: total(({ counters }) => (counters.cloneFaultCount ?? 0) + (counters.parentFaultCount ?? 0)),
      });
      observer.onProgress(this.#joined.length === 0 ? described : { ...described, hosts: fills.map(progressOf) });
      if (fills.every(isOver)) return this.#found(await this.#multicastBytes());
      // What keeps the root from copying is its own to say, and shows only when nothing advances.
      const trouble = this.#joined.find((fill) => fill.trouble !== null)?.trouble ?? null;
      reportTrouble(this.#context, trouble);
      if (nowMs - marks.advancedAtMs > limits.recoveryMsMax) throw this.#stuck(trouble ?? this.#root.trouble);
      await this.#releaseRoot();
      await pause(ports.clock, pace.nextMs(described.secondsLeft), halt);
    }
  }

  async #askRoot(): Promise<void> {
    const fill = this.#root;
    if (isOver(fill)) return;
    const progress = await this.#progressOf(fill);
    if (progress?.state === 'failed') throw incomplete(this.#context, progress.error);
    note(fill, progress);
  }

  async #askJoined(fill: Fill): Promise<void> {
    if (fill.joined === null || isOver(fill)) return;
    const { findings } = this.#context;
    try {
      if (!findings.ran.includes(fill.host)) await runJoined(this.#context, fill.joined);
      if (findings.lost.includes(fill.host)) {
        fill.state = 'lost';
        fill.trouble = null;
        return;
      }
      const progress = await this.#progressOf(fill);
      if (progress === null) Object.assign(fill, { state: 'lost', trouble: null });
      else if (progress.state === 'failed') this.#lose(fill, fill.joined, progress.error);
      else note(fill, progress);
    } catch (error) {
      fill.trouble = namingHost(fill.host, toMigrationError(error));
    }
  }

  #lose(fill: Fill, joined: JoinedHost, thrown: unknown): void {
    const error = MigrationError.from(thrown, fill.host);
    const what =
      error.code === 'DAMAGED'
        ? `the clones on ${fill.host} stand still for good, because their memory is damaged`
        : `the clones on ${fill.host} have ended, because their pages cannot come`;
    this.#context.observer.onWarning(what, error);
    noteEnded(this.#context, joined, error);
    this.#lastLoss = error;
    fill.state = 'lost';
    fill.trouble = null;
  }

  async #progressOf({ host, forks }: Fill): Promise<ForkProgress | null> {
    const { record, ports, limits } = this.#context;
    const asking = forks.forkProgress(record.fork);
    try {
      return await withDeadline(ports.clock, asking, limits.callMsMax, `asking ${host} how full the image is`);
    } catch (error) {
      // The root: an earlier life of the daemon has finished the fork, whose image is complete then. Another host: it
      // has lost its part after its clones had run, or a user has given it up.
      if (toMigrationError(error).code === 'NOT_FOUND') return null;
      throw error;
    }
  }

  /**
   * The parent need not stay protected until the other hosts have all pages: the image is complete, and the root serves
   * it without the parent. Another job of the parent begins only when this one has ended.
   */
  async #releaseRoot(): Promise<void> {
    const { record, ports, findings, limits, observer } = this.#context;
    const isGone = this.#joined.every(({ host, state }) => state === 'lost' || findings.ran.includes(host));
    if (this.#isRootReleased || this.#joined.length === 0 || !isOver(this.#root) || !isGone) return;
    this.#isRootReleased = true;
    // From here on the root says them no more, also to the next daemon.
    const { counters, pageBytes } = this.#root;
    const found = pageBytes > 0 ? { counters, pageBytes } : {};
    Object.assign(findings, found);
    const releasing = async (): Promise<void> => {
      await ports.journal
        .append({ type: 'begin', job: record.job, step: 'fillImage', found })
        .catch((error: unknown) => {
          observer.onWarning('the report of a later daemon may lack the figures of the root', error);
        });
      await ports.forks.finishFork(record.fork);
      if (record.plan.request.vm !== null) await ports.parent.unreserve(parentOf(record), record.job);
    };
    try {
      await withDeadline(ports.clock, releasing(), limits.callMsMax, 'releasing the parent');
    } catch (error) {
      // The step releaseParent does it again.
      observer.onWarning('the parent waits for the hosts that read its image', error);
    }
  }

  /** For the report only. */
  async #multicastBytes(): Promise<number> {
    const { record, ports, limits, findings } = this.#context;
    if (record.plan.fanout?.kind !== 'multicast') return 0;
    try {
      const asking = ports.fanout.multicastSent(findings.image ?? record.fork);
      return (await withDeadline(ports.clock, asking, limits.callMsMax, 'asking what was sent')).sentBytes;
    } catch (error) {
      this.#context.observer.onWarning('the report lacks what was sent as a multicast', error);
      return findings.multicastBytes;
    }
  }

  #found(multicastBytes: number): Partial<ForkFindings> | undefined {
    const { findings } = this.#context;
    const { counters, pageBytes } = this.#root;
    // The root has finished the fork in an earlier life of the daemon.
    const own = pageBytes === 0 ? {} : { counters, pageBytes };
    if (this.#joined.length === 0) return pageBytes === 0 ? undefined : own;
    const { clones, ready, failures, ran, lost } = findings;
    const { request, parent } = this.#context.record.plan;
    // Without clones nothing but the image was wanted, and no failure of a clone would tell of its loss.
    if (request.cloneCount === 0 && lost.length > 0) {
      throw new MigrationError('VM_LOST', `the image of ${parent} cannot be copied to ${lost.join(', ')}`, {
        remedy: '"vmctl images --all-hosts" says what is left; "vmctl image rm" there removes it',
        ...(this.#lastLoss === null ? {} : { cause: this.#lastLoss }),
      });
    }
    const joined = Object.fromEntries(this.#joined.map((fill) => [fill.host, fill.counters]));
    const near = Object.fromEntries(this.#joined.map((fill) => [fill.host, fill.nearBytes]));
    return { ...own, joined, near, multicastBytes, clones, ready, failures, ran, lost };
  }

  #stuck(cause: MigrationError | null): MigrationError {
    const { recoveryMsMax } = this.#context.limits;
    const late = [this.#root, ...this.#joined].filter((fill) => !isOver(fill)).map(({ host }) => host);
    return new MigrationError('NEEDS_RECOVERY', `no page has been copied for ${recoveryMsMax} ms`, {
      remedy: `check the load of ${late.join(', ')}; the job goes on by itself`,
      ...(cause === null ? {} : { cause }),
    });
  }
}

/** Returns how many pages the host has checked since the last call. */
function takeChecked(fill: Fill): number {
  const { checkedPages = 0 } = fill.counters;
  const more = Math.max(0, checkedPages - fill.checkedPages);
  fill.checkedPages = checkedPages;
  return more;
}

function note(fill: Fill, progress: ForkProgress | null): void {
  if (progress === null) {
    fill.state = 'complete';
    fill.pagesDone = fill.pagesTotal;
    fill.trouble = null;
    return;
  }
  const { state, pagesTotal, pagesDone, pageBytes, counters, nearBytes = {} } = progress;
  const trouble = troubleOf(progress, fill.joined === null ? AGENT : fill.host) ?? null;
  Object.assign(fill, { state, pagesTotal, pagesDone, pageBytes, counters, nearBytes, trouble });
}

/** The same on all hosts. The root may have forgotten the fork. */
function pageBytesOf(fills: readonly Fill[]): number {
  return Math.max(...fills.map(({ pageBytes }) => pageBytes));
}

function isOver({ state }: Fill): boolean {
  return state === 'complete' || state === 'lazy' || state === 'lost';
}

function bytesOf({ counters, pagesDone, pageBytes }: Fill): number {
  return counters.copiedBytes ?? pagesDone * pageBytes;
}

function progressOf(fill: Fill): HostProgress {
  const { host, state, pagesTotal, pagesDone } = fill;
  return { host, state, pagesTotal, pagesDone, bytesDone: bytesOf(fill) };
}

function incomplete({ record, findings }: ForkStepContext, thrown: unknown): MigrationError {
  const cause = MigrationError.from(thrown, AGENT);
  const { parent } = record.plan;
  const image = findings.image ?? record.fork;
  const remedy =
    `${parent} is not affected; ` +
    `remove what is left with "vmctl stop --image ${image}" and "vmctl image rm ${image}"`;
  return new MigrationError(
    'VM_LOST',
    `the image of ${parent} cannot be completed, so its clones have been ended: ${cause.message}`,
    { remedy, cause },
  );
}

/** vmigrate's side of `fanout`: forks one busy guest again and again, on its host alone or on many hosts. */
import type { CloneReport, ForkReport } from '../../src/domain/fork.js';
import { checkClones } from '../../test/hosts/clone-check.js';
import { sleep } from '../../test/hosts/cluster.js';
import { Guest } from '../../test/hosts/guest.js';
import type { ManyHosts } from '../../test/hosts/many-hosts.js';
import { inTurns } from '../../test/hosts/turns.js';
import type { RestoredGuest } from './restored-qemu.js';
import { touchedBytes } from './touched-pages.js';

const SETTLE_MS = 1000;
const CALLS_AT_ONCE = 8;
/** How long the clones of a lazy image work before they are paused and looked at. */
const LAZY_WORK_MS = 300;

export interface FanoutTrial {
  readonly report: ForkReport;
  /** From the beginning of the step in which the parent stops. */
  readonly firstFromStopMs: number;
  readonly lastFromStopMs: number;
  readonly badPages: number;
}

export interface LazyTrial {
  /** Memory of the image on all hosts that joined, and what their clones have touched of it. */
  readonly imageBytes: number;
  readonly touchedBytes: number;
  /** What the image takes on the host that has all of it. */
  readonly wholeBytes: number;
}

export class FanoutSide {
  #forks = 0;

  private constructor(
    private readonly hosts: ManyHosts,
    private readonly guest: Guest,
  ) {}

  static async start(hosts: ManyHosts, shape: RestoredGuest): Promise<FanoutSide> {
    const side = new FanoutSide(hosts, await Guest.start(hosts.cluster, hosts.root, { name: 'parent', ...shape }));
    await side.#parent('pause');
    return side;
  }

  /** Forks the guest, checks the clones, and removes them. `checked` is how many of each host's clones are checked. */
  async fork(cloneCount: number, where: 'root' | 'all', checked: number): Promise<FanoutTrial> {
    const report = await this.#fork(
      cloneCount,
      ...(where === 'all' ? ['--hosts', 'all', '--tcp', '--fanout', 'unicast'] : []),
    );
    const lastFromStopMs = lastAfterStop(report);
    const seen: Record<string, number> = {};
    const isChecked = ({ host }: CloneReport) => {
      seen[host] = (seen[host] ?? 0) + 1;
      return (seen[host] ?? 0) <= checked;
    };
    await this.#parent('pause');
    await this.#pauseClones(report);
    const { badPages } = await checkClones(this.hosts.cluster, report.clones.filter(isChecked));
    await this.hosts.clear();
    return {
      report,
      firstFromStopMs: lastFromStopMs - (report.lastReadyMs - report.firstReadyMs),
      lastFromStopMs,
      badPages,
    };
  }

  /** One clone on each host, whose pages are read only when it touches them. */
  async lazyFork(): Promise<LazyTrial> {
    const report = await this.#fork(this.hosts.names.length, '--hosts', 'all', '--tcp', '--fetch', 'demand');
    await sleep(LAZY_WORK_MS);
    await this.#pauseClones(report);
    await this.#parent('pause');
    const sum = { imageBytes: 0, touchedBytes: 0, wholeBytes: 0 };
    for (const host of this.hosts.names) {
      const image = (await this.hosts.images(host)).find(({ id }) => id === report.image);
      const bytes = image?.allocatedBytes ?? Number.NaN;
      if (host === this.hosts.root) {
        sum.wholeBytes = bytes;
        continue;
      }
      sum.imageBytes += bytes;
      sum.touchedBytes += touchedBytes(await this.hosts.cluster.qemuPids(host), this.hosts.cluster.ramDirectory(host));
    }
    await this.hosts.clear();
    return sum;
  }

  async badPagesOfParent(): Promise<number> {
    await this.#parent('resume');
    const { pages, bad } = await this.guest.verify(this.hosts.root);
    return pages === 0 ? Number.NaN : bad;
  }

  /** The guest runs for a while first, so that it is as busy at each fork as at the first. */
  async #fork(cloneCount: number, ...args: string[]): Promise<ForkReport> {
    await this.#parent('resume');
    await sleep(SETTLE_MS);
    const options = ['--clones', `${cloneCount}`, '--network', 'none', '--name', `fan${this.#forks++}`];
    const report = await this.hosts.fork(this.guest.name, ...options, ...args);
    if (report.clones.length !== cloneCount) throw new Error(`clones are missing: ${JSON.stringify(report.failures)}`);
    return report;
  }

  async #pauseClones({ clones }: ForkReport): Promise<void> {
    await inTurns(clones, CALLS_AT_ONCE, ({ host, name }) =>
      this.hosts.cluster.api(host).post(`/v1/vms/${name}/pause`),
    );
  }

  async #parent(action: 'pause' | 'resume'): Promise<void> {
    await this.hosts.cluster.api(this.hosts.root).post(`/v1/vms/${this.guest.name}/${action}`);
  }
}

/**
 * The report counts a clone's time from the request and does not say when the parent stopped. From the beginning of
 * `forkPoint` to the end of `runClones` the steps follow one another without a gap, and the last clone has resumed when
 * the last of them ends. So this is an upper bound.
 */
function lastAfterStop({ phases }: ForkReport): number {
  const [from, to] = ['forkPoint', 'runClones'].map((step) => phases.findIndex(({ name }) => name === step));
  if (from === undefined || to === undefined || from < 0 || to < from) throw new Error('the report lacks steps');
  return phases.slice(from, to + 1).reduce((sum, { ms }) => sum + ms, 0);
}

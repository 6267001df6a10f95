/**
 * `npm run -s bench -- fanout`: one busy guest becomes many on eight hosts, against the same on one host, and against
 * what a user does without vmigrate: save, copy and restore. The rows are interleaved. All hosts share this machine's
 * processors.
 */
import { ManyHosts } from '../test/hosts/many-hosts.js';
import { CopiedRestores, type CopiedRun } from './lib/copied-restore.js';
import { type FanoutResult, forkRow, lazyOf, restoreRow, rowText } from './lib/fanout-rows.js';
import { FanoutSide, type FanoutTrial, type LazyTrial } from './lib/fanout-side.js';
import { describeMachine } from './lib/machine.js';
import { noTrials, type SpreadTrials, spreadRatios, spreadRow, spreadText } from './lib/spread-rows.js';
import { SPREAD_KINDS, SpreadSide } from './lib/spread-side.js';
import { round } from './lib/stats.js';

const GUEST = { memoryMiB: 256, touchMiB: 96, writePercent: 20 };
const HOSTS = 8;
const MOST = 64;
const MEMORY_BUDGET = '4G';

interface Trials {
  readonly oneHostOne: FanoutTrial[];
  readonly allHostsOneEach: FanoutTrial[];
  readonly oneHostMost: FanoutTrial[];
  readonly allHostsMost: FanoutTrial[];
  readonly restored: CopiedRun[];
  readonly lazy: LazyTrial[];
  readonly spread: SpreadTrials;
}

export async function benchFanout(options: { isQuick: boolean; log: (line: string) => void }): Promise<FanoutResult> {
  const rounds = options.isQuick ? 2 : 5;
  // A check takes longer than all that is measured. So all clones are checked once, and then one on each host.
  const checkedIn = (round: number) => (options.isQuick || round > 1 ? 1 : MOST);
  const machine = describeMachine();
  const hosts = await ManyHosts.create({ count: HOSTS, memoryBudget: MEMORY_BUDGET });
  const restores = new CopiedRestores(hosts.cluster, hosts.names, GUEST);
  const trials: Trials = {
    ...{
      oneHostOne: [],
      allHostsOneEach: [],
      oneHostMost: [],
      allHostsMost: [],
      restored: [],
      lazy: [],
      spread: noTrials(),
    },
  };
  try {
    const side = await FanoutSide.start(hosts, GUEST);
    await restores.start();
    for (let n = 1; n <= rounds; n++) {
      for (const [kind, count, where] of [
        ['oneHostOne', 1, 'root'],
        ['allHostsOneEach', HOSTS, 'all'],
        ['oneHostMost', MOST, 'root'],
        ['allHostsMost', MOST, 'all'],
      ] as const) {
        const trial = await side.fork(count, where, checkedIn(n));
        trials[kind].push(trial);
        options.log(`round ${n}/${rounds} ${rowText(forkRow(kind, where === 'all' ? HOSTS : 1, [trial]))}`);
      }
      const run = await restores.run(MOST / HOSTS);
      trials.restored.push(run);
      options.log(`round ${n}/${rounds} ${rowText(restoreRow('save, rsync, restore', MOST, HOSTS, [run]))}`);
      const lazy = await side.lazyFork();
      trials.lazy.push(lazy);
      options.log(`round ${n}/${rounds} lazy: ${JSON.stringify(lazy)}`);
    }
    const badPagesOfParent = await side.badPagesOfParent();
    await restores.stop();
    await hosts.destroy();
    await spreadImages(trials.spread, rounds, options.log);
    return resultOf(trials, { machine, rounds, badPagesOfParent });
  } finally {
    await restores.stop();
    await hosts.destroy();
  }
}

/** Hosts of their own, in racks, with slow links. The rows are interleaved. */
async function spreadImages(trials: SpreadTrials, rounds: number, log: (line: string) => void): Promise<void> {
  const side = await SpreadSide.start();
  try {
    for (let n = 1; n <= rounds; n++) {
      for (const kind of SPREAD_KINDS) {
        if (n > 1 && 'isFirstRoundOnly' in kind) continue;
        const trial = await side.run(kind);
        trials[kind.name].push(trial);
        log(`round ${n}/${rounds} ${spreadText(spreadRow(kind, [trial]))}`);
      }
    }
  } finally {
    await side.stop();
  }
}

function resultOf(trials: Trials, run: Pick<FanoutResult, 'machine' | 'rounds' | 'badPagesOfParent'>): FanoutResult {
  const one = forkRow('fork, one host', 1, trials.oneHostOne);
  const oneEach = forkRow('fork, one clone a host', HOSTS, trials.allHostsOneEach);
  const most = forkRow('fork, one host', 1, trials.oneHostMost);
  const mostOnAll = forkRow('fork, spread', HOSTS, trials.allHostsMost);
  const restored = restoreRow('save, rsync, restore', MOST, HOSTS, trials.restored);
  const { ratio: lazyMemoryOverTouched, ...lazy } = lazyOf(trials.lazy);
  const over = (figure: 'lastFromStopMs' | 'lastFromRequestMs', row: typeof one, base: typeof one) =>
    round(row.spread[figure].median / base.spread[figure].median, 3);
  return {
    scenario: 'fanout',
    ...run,
    scale: { memoryMiB: GUEST.memoryMiB, touchMiB: GUEST.touchMiB, clones: MOST, hosts: HOSTS },
    rows: [one, oneEach, most, mostOnAll, restored],
    lazy,
    spread: SPREAD_KINDS.map((kind) => spreadRow(kind, trials.spread[kind.name])),
    ratios: {
      firstClone8Over1: over('lastFromStopMs', oneEach, one),
      lastOf64OverOneHost: over('lastFromStopMs', mostOnAll, most),
      timeOverScpRestore: over('lastFromRequestMs', mostOnAll, restored),
      timeFromStopOverScpRestore: over('lastFromStopMs', mostOnAll, restored),
      lazyMemoryOverTouched,
      ...spreadRatios(trials.spread),
    },
    figures: {
      firstCloneMs: round(oneEach.spread.lastFromStopMs.median, 0),
      lastOf64Ms: round(mostOnAll.spread.lastFromStopMs.median, 0),
    },
  };
}

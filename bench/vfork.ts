/**
 * `npm run -s bench -- vfork`: starts N copies of one guest, with vmigrate (with and without waiting QEMU processes)
 * and with QEMU from a state saved beforehand. QEMU's parent has ended when its copies start. vmigrate's parent keeps
 * running, and uses the same two cores.
 */
import { Cluster, sleep } from '../test/hosts/cluster.js';
import { firstWork, type GuestShape, LATER_MS, memoryOf, OurParent, readSafe } from './lib/fork-parent.js';
import { type ForkRow, resultOf, rowText, type VforkResult } from './lib/fork-rows.js';
import { describeMachine } from './lib/machine.js';
import { cpuSeconds } from './lib/process-cost.js';
import { QemuRestores, type RestoreMode } from './lib/qemu-restore.js';

const SMALL: GuestShape = { memoryMiB: 256, touchMiB: 96, writePercent: 20 };
const BIG: GuestShape = { memoryMiB: 2048, touchMiB: 1536, writePercent: 20 };
const MOST = 64;

/** Returns what is measured. The quick scenario omits everything that no ratio or figure needs. */
function scenarioOf(isQuick: boolean): { small: readonly number[]; big: readonly number[]; rounds: number } {
  return isQuick ? { small: [1, MOST], big: [1], rounds: 1 } : { small: [1, 8, MOST], big: [1, 4], rounds: 3 };
}

async function restoreRow(restores: QemuRestores, mode: RestoreMode, count: number): Promise<ForkRow> {
  const run = await restores.run(mode, count);
  const cpuS = cpuSeconds(run.pids) - run.cpuBeforeS;
  const now = memoryOf(run);
  const workAtMs = await firstWork(() => run.serialLogs);
  await sleep(LATER_MS);
  const later = memoryOf(run);
  const badPagesClones = run.serialLogs.reduce(
    (sum, log) => sum + (readSafe(log).match(/^VMG BAD /gm)?.length ?? 0),
    0,
  );
  await restores.endAll();
  return {
    name: `qemu-${mode}`,
    parentMiB: SMALL.memoryMiB,
    clones: count,
    parentPauseMs: null,
    parentBackMs: null,
    firstMs: run.firstMs,
    lastMs: run.lastMs,
    firstWorkMs: workAtMs - run.startedAtMs,
    totalMs: run.lastMs,
    privateMiBPerClone: now.privateMiB,
    privateMiBPerCloneLater: later.privateMiB,
    sharedMiB: mode === 'full' ? 0 : SMALL.memoryMiB,
    faultsPerClone: now.faults,
    cpuMsPerClone: (cpuS * 1000) / count,
    badPagesParent: null,
    badPagesClones,
    distinctClones: null,
  };
}

export async function benchVfork(options: { isQuick: boolean; log: (line: string) => void }): Promise<VforkResult> {
  const { small, big, rounds } = scenarioOf(options.isQuick);
  const machine = describeMachine();
  const rows: ForkRow[] = [];
  const add = async (row: Promise<ForkRow>): Promise<void> => {
    const done = await row;
    rows.push(done);
    options.log(rowText(done));
  };
  const cluster = await Cluster.create({ hosts: ['A'] });
  try {
    for (const [shape, counts] of [
      [SMALL, small],
      [BIG, big],
    ] as const) {
      const parent = await OurParent.start(cluster, shape);
      for (const count of counts) {
        // A pause of some milliseconds varies, so forks of one clone are repeated. Many clones average by themselves.
        for (let round = 0; round < (count === 1 ? rounds : 1); round++) {
          for (const isWarm of [false, true]) await add(parent.row(count, isWarm));
        }
      }
      await parent.stop();
    }
    const restores = new QemuRestores(cluster, SMALL);
    await restores.save();
    for (const count of small) {
      for (const mode of ['full', 'template', 'waiting'] as const) await add(restoreRow(restores, mode, count));
    }
  } finally {
    await cluster.destroy();
  }
  return resultOf(rows, { smallMiB: SMALL.memoryMiB, bigMiB: BIG.memoryMiB, most: MOST }, machine);
}

/** Runs a guest under stock QEMU and moves it once with QEMU's own migration. */
import { eventually, sleep } from '../../test/hosts/cluster.js';
import { lostWork } from './lost-work.js';
import { AFTER_MS, other, SETTLE_MS } from './our-side.js';
import type { QemuMode, QemuPair, QemuProcess } from './qemu-pair.js';
import { rateAfter, readWork } from './rate.js';
import type { Trial } from './rows.js';

/** A guest that reports fewer windows than this after a move did not survive it. */
const WINDOWS_ALIVE_MIN = 5;
export async function startBaseline(pair: QemuPair): Promise<QemuProcess> {
  const baseline = await pair.start('A', false);
  await eventually('the baseline guest works', 90_000, () =>
    readWork(baseline.serialLog).length >= 5 ? true : undefined,
  );
  await baseline.qmp.execute('stop');
  return baseline;
}

export async function qemuTrial(
  pair: QemuPair,
  at: QemuProcess,
  mode: QemuMode,
  moveMsMax?: number,
): Promise<{ trial: Trial; target: QemuProcess; isAlive: boolean }> {
  await at.qmp.execute('cont');
  await sleep(SETTLE_MS);
  const before = readWork(at.serialLog);
  const { target, move } = await pair.move(at, other(at.host), mode, moveMsMax);
  await sleep(AFTER_MS);
  const after = readWork(target.serialLog);
  const rate = rateAfter(before, after);
  await target.qmp.execute('stop');
  return {
    target,
    isAlive: after.length >= WINDOWS_ALIVE_MIN && (after.at(-1)?.bad ?? 0) === 0,
    trial: {
      ...move,
      lostWorkMs: lostWork({
        before,
        source: readWork(at.serialLog).slice(before.length),
        target: after,
        blackoutMs: move.blackoutMs,
      }),
      degradedMs: rate.degradedMs,
      stallMsMax: rate.stallMsMax,
      faultP50Us: Number.NaN,
      faultP99Us: Number.NaN,
    },
  };
}

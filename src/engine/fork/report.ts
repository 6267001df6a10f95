import type { CloneReport, ForkReport } from '../../domain/fork.js';
import type { ForkStepContext } from './context.js';

/** Builds the report from the steps' findings, also if these come from several lives of the daemon. */
export function buildForkReport({ record, ports, findings, phases, marks }: ForkStepContext): ForkReport {
  const { host, parent, memoryBytes, coldReason, shares } = record.plan;
  const counter = (name: string): number => findings.counters[name] ?? 0;
  const totalMs =
    marks.startedAtMs !== null
      ? ports.clock.nowMs() - marks.startedAtMs
      : Date.parse(ports.clock.isoNow()) - Date.parse(record.createdAt);
  const hostOf = (index: number): string =>
    shares?.find(({ first, count }) => index >= first && index < first + count)?.host ?? host;
  const clones = findings.ready.flatMap(({ index, readyMs }): CloneReport[] => {
    const identity = findings.clones.find((clone) => clone.index === index);
    if (identity === undefined) return [];
    return [{ ...identity, host: hostOf(index), mac: Object.values(identity.macs)[0] ?? null, readyMs }];
  });
  const joined = Object.entries(findings.joined);
  const readBytes = Object.fromEntries(joined.map(([name, { copiedBytes = 0 }]) => [name, copiedBytes]));
  const joinedFaultCount = joined.reduce((sum, [, { cloneFaultCount = 0 }]) => sum + cloneFaultCount, 0);
  const readyMs = clones.map((clone) => clone.readyMs);
  return {
    job: record.job,
    image: findings.image ?? record.plan.request.image ?? record.fork,
    parent,
    parentPauseMs: findings.parentPauseMs,
    isWarm: findings.isWarm,
    ...(coldReason === undefined || findings.isWarm ? {} : { coldReason }),
    totalMs: Math.max(0, totalMs),
    firstReadyMs: readyMs.length === 0 ? 0 : Math.min(...readyMs),
    lastReadyMs: readyMs.length === 0 ? 0 : Math.max(...readyMs),
    memoryBytes,
    clones: clones.sort((one, other) => one.index - other.index),
    failures: findings.failures,
    bytes: {
      copied: counter('copiedBytes'),
      zeroSkipped: counter('pagesZero') * findings.pageBytes,
      deviceState: findings.deviceStateBytes,
      perHost: { [host]: counter('copiedBytes'), ...readBytes },
      // Every host reads from the root, and gets the device state from it.
      rootEgress:
        Object.values(readBytes).reduce((sum, bytes) => sum + bytes, 0) +
        Object.keys(readBytes).length * findings.deviceStateBytes,
      multicast: 0,
      repair: 0,
    },
    faults: { parent: counter('parentFaultCount'), clones: counter('cloneFaultCount') + joinedFaultCount },
    phases: [...phases, ...findings.pauseParts.map(({ name, ms }) => ({ name: `forkPoint.${name}`, ms }))],
  };
}

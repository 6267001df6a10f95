import type { MigrationReport } from '../../domain/migration.js';
import type { Findings, StepContext } from './context.js';

const US_PER_MS = 1e3;
const NS_PER_MS = 1e6;
const NS_PER_US = 1e3;
const NS_PER_S = 1e9;

/**
 * If the hosts' clocks disagree the result is wrong, even negative. It is reported unchanged and documented as such.
 */
function blackoutByEventsMs({ stoppedAtUs, resumedAtUs, blackoutMs }: Findings): number {
  if (stoppedAtUs === null || resumedAtUs === null) return blackoutMs ?? 0;
  return (resumedAtUs - stoppedAtUs) / US_PER_MS;
}

/** Builds the report from the steps' findings, also if these come from several lives of the daemon. */
export function buildReport({ record, ports, findings, phases, marks }: StepContext): MigrationReport {
  const { request, transportReason, source, memoryBytes } = record.plan;
  const target = (name: string): number => findings.targetCounters[name] ?? 0;
  const origin = (name: string): number => findings.sourceCounters[name] ?? 0;
  const totalMs =
    marks.startedAtMs !== null
      ? ports.clock.nowMs() - marks.startedAtMs
      : Date.parse(ports.clock.isoNow()) - Date.parse(record.createdAt);
  return {
    job: record.job,
    vm: request.vm,
    mode: request.mode,
    transport: request.transport,
    transportReason,
    source,
    target: request.target,
    memoryBytes,
    ...(request.sharedStorage === undefined ? {} : { sharedStorage: request.sharedStorage }),
    ...(request.dataSecurity === undefined ? {} : { dataSecurity: request.dataSecurity }),
    ...(findings.verified === null ? {} : { verified: findings.verified }),
    blackoutMs: findings.blackoutMs ?? 0,
    blackoutByEventsMs: blackoutByEventsMs(findings),
    degradedMs: target('degradedNs') / NS_PER_MS,
    totalMs: Math.max(0, totalMs),
    rounds: findings.rounds,
    bytes: {
      // QEMU's own migration has counted it, or the target.
      push: findings.pushBytes + target('pushBytes'),
      demand: target('demandBytes'),
      prefetch: target('prefetchBytes'),
      zeroSkipped: target('pagesZero') * findings.pageBytes,
      deviceState: findings.deviceStateBytes,
    },
    faults: {
      count: target('faultCount'),
      p50Us: target('faultP50Ns') / NS_PER_US,
      p99Us: target('faultP99Ns') / NS_PER_US,
      maxUs: target('faultMaxNs') / NS_PER_US,
    },
    sourceCpuS: origin('cpuNs') / NS_PER_S,
    targetCpuS: target('cpuNs') / NS_PER_S,
    reconnects: target('reconnectCount'),
    guestEnd: findings.guestEnd,
    phases,
  };
}

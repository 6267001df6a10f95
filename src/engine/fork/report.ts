import type { FanoutPlan } from '../../domain/fanout.js';
import type { CloneReport, ForkReport } from '../../domain/fork.js';
import type { ForkFindings, ForkStepContext } from './context.js';

/** Builds the report from the steps' findings, also if these come from several lives of the daemon. */
export function buildForkReport({ record, ports, findings, phases, marks }: ForkStepContext): ForkReport {
  const { host, parent, memoryBytes, coldReason, shares, fanout } = record.plan;
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
  const sent = bytesSent(findings, host);
  const nearBytes = sum(joined.map(([, { nearBytes: bytes = 0 }]) => bytes));
  const isMulticast = fanout?.kind === 'multicast';
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
      // Every host gets the device state from the root.
      rootEgress: (sent[host] ?? 0) + joined.length * findings.deviceStateBytes,
      multicast: findings.multicastBytes,
      repair: isMulticast ? sum(joined.map(([, counters]) => rootBytesOf(counters))) + nearBytes : 0,
      relayed: isMulticast ? 0 : nearBytes,
      perLink: sent,
    },
    ...(fanout === undefined ? {} : { fanout: { ...planned(fanout), lossPerHost: lossOf(joined) } }),
    faults: { parent: counter('parentFaultCount'), clones: counter('cloneFaultCount') + joinedFaultCount },
    phases: [...phases, ...findings.pauseParts.map(({ name, ms }) => ({ name: `forkPoint.${name}`, ms }))],
  };
}

function planned({ kind, reason, provider }: FanoutPlan) {
  return { kind, reason, ...(provider === undefined ? {} : { provider }) };
}

type Counters = Readonly<Record<string, number>>;

const sum = (numbers: readonly number[]): number => numbers.reduce((one, other) => one + other, 0);

/** What a host has read from the root. */
function rootBytesOf({ demandBytes = 0, prefetchBytes = 0 }: Counters): number {
  return demandBytes + prefetchBytes;
}

/** What each host has sent to others: bytes of pages, and of datagrams in a multicast, which counts once. */
function bytesSent({ joined, near, multicastBytes }: ForkFindings, root: string): Record<string, number> {
  const sent = new Map([[root, multicastBytes + sum(Object.values(joined).map(rootBytesOf))]]);
  for (const from of Object.values(near)) {
    for (const [host, bytes] of Object.entries(from)) sent.set(host, (sent.get(host) ?? 0) + bytes);
  }
  return Object.fromEntries([...sent].filter(([, bytes]) => bytes > 0));
}

/** The share of the datagrams that each host has lost. */
function lossOf(joined: readonly (readonly [string, Counters])[]): Record<string, number> {
  return Object.fromEntries(
    joined.flatMap(([host, { multicastDatagrams = 0, multicastLostDatagrams = 0 }]) => {
      const total = multicastDatagrams + multicastLostDatagrams;
      return total === 0 ? [] : [[host, multicastLostDatagrams / total] as const];
    }),
  );
}

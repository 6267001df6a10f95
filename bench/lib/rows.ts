/** The figures of one move, and the table row that sums up all moves of one kind. */
import { type LostWork, lostWorkSumMs } from './lost-work.js';
import { round, type Sampled, sampled } from './stats.js';

export interface Trial {
  readonly blackoutMs: number;
  readonly lostWorkMs: LostWork;
  readonly degradedMs: number;
  readonly stallMsMax: number;
  readonly faultP50Us: number;
  readonly faultP99Us: number;
  readonly requestMeanUs: number;
  readonly totalMs: number;
  readonly bytes: number;
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
}

export interface MoveRow {
  readonly name: string;
  readonly blackoutMs: number;
  /** Medians, each of its own. */
  readonly lostWorkMs: LostWork & { readonly sum: number };
  readonly degradedMs: number;
  readonly stallMsMax: number;
  readonly faultP50Us: number | null;
  readonly faultP99Us: number | null;
  /** QEMU's blocktime divided by its requests; null for vmigrate's moves. */
  readonly requestMeanUs: number | null;
  readonly totalMs: number;
  readonly bytes: number;
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
  readonly badPages: number;
  /** Number of guests that were dead or had bad pages after a move. Each such move was repeated with a new guest. */
  readonly guestsLost: number;
  readonly spread: Record<string, Sampled>;
}

export function row(name: string, trials: readonly Trial[], badPages: number, guestsLost: number): MoveRow {
  const of = (pick: (trial: Trial) => number) => sampled(trials.map((trial) => round(pick(trial), 3)));
  const orNull = (sample: Sampled) => (Number.isNaN(sample.median) ? null : round(sample.median, 1));
  const spread = {
    blackoutMs: of((trial) => trial.blackoutMs),
    lostWorkMs: of((trial) => lostWorkSumMs(trial.lostWorkMs)),
    lostWorkBeforeMs: of((trial) => trial.lostWorkMs.before),
    lostWorkAfterMs: of((trial) => trial.lostWorkMs.after),
    degradedMs: of((trial) => trial.degradedMs),
    stallMsMax: of((trial) => trial.stallMsMax),
    faultP50Us: of((trial) => trial.faultP50Us),
    faultP99Us: of((trial) => trial.faultP99Us),
    requestMeanUs: of((trial) => trial.requestMeanUs),
    totalMs: of((trial) => trial.totalMs),
    bytes: of((trial) => trial.bytes),
    sourceCpuS: of((trial) => trial.sourceCpuS),
    targetCpuS: of((trial) => trial.targetCpuS),
  };
  return {
    name,
    blackoutMs: round(spread.blackoutMs.median),
    lostWorkMs: {
      before: round(spread.lostWorkBeforeMs.median),
      blackout: round(spread.blackoutMs.median),
      after: round(spread.lostWorkAfterMs.median),
      sum: round(spread.lostWorkMs.median),
    },
    degradedMs: round(spread.degradedMs.median),
    stallMsMax: round(spread.stallMsMax.median),
    faultP50Us: orNull(spread.faultP50Us),
    faultP99Us: orNull(spread.faultP99Us),
    requestMeanUs: orNull(spread.requestMeanUs),
    totalMs: round(spread.totalMs.median, 1),
    bytes: spread.bytes.median,
    sourceCpuS: round(spread.sourceCpuS.median, 3),
    targetCpuS: round(spread.targetCpuS.median, 3),
    badPages,
    guestsLost,
    spread,
  };
}

const COLUMNS = [
  'row',
  'blackout ms',
  'lost work ms: before + blackout + after',
  'degraded ms',
  'longest stall ms',
  'fault p50 / p99 µs',
  'total ms',
  'MiB',
  'source CPU s',
  'target CPU s',
  'bad pages',
  'guests lost',
];

const tableRow = (cells: readonly (string | number)[]): string => `| ${cells.join(' | ')} |`;

/** Median and spread. */
export function span(sample: Sampled | undefined, digits = 1): string {
  if (sample === undefined) return '';
  return `${round(sample.median, digits)} (${round(sample.min, digits)}–${round(sample.max, digits)})`;
}

/** Returns the lines of a Markdown table. */
export function renderRows(rows: readonly MoveRow[]): string[] {
  const lines = [tableRow(COLUMNS), tableRow(COLUMNS.map(() => '---'))];
  for (const {
    name,
    spread,
    lostWorkMs,
    badPages,
    guestsLost,
    faultP50Us,
    faultP99Us,
    requestMeanUs,
    bytes,
    sourceCpuS,
    targetCpuS,
  } of rows) {
    const faults =
      faultP50Us === null ? (requestMeanUs === null ? '–' : `mean ${requestMeanUs}`) : `${faultP50Us} / ${faultP99Us}`;
    const { before, blackout, after } = lostWorkMs;
    const parts = [before, blackout, after].map((part) => round(part, 0)).join(' + ');
    const lostWork = `${span(spread.lostWorkMs, 0)}: ${parts}`;
    const times = [span(spread.blackoutMs), lostWork, span(spread.degradedMs, 0), span(spread.stallMsMax)];
    const mib = round(bytes / (1 << 20), 0);
    const totals = [span(spread.totalMs, 0), mib, sourceCpuS, targetCpuS, badPages, guestsLost];
    lines.push(tableRow([name, ...times, faults, ...totals]));
  }
  return lines;
}

export function renderRatios(ratios: Readonly<Record<string, number>>): string[] {
  return [
    '',
    '| ratio | value |',
    '| --- | --- |',
    ...Object.entries(ratios).map(([name, value]) => `| ${name} | ${value} |`),
  ];
}

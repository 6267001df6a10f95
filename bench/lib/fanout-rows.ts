/** The rows of the `fanout` benchmark, and the ratios made from them. */
import type { PhaseTime } from '../../src/domain/progress.js';
import type { CopiedRun } from './copied-restore.js';
import type { FanoutTrial, LazyTrial } from './fanout-side.js';
import { describeRun, type Machine } from './machine.js';
import { printSpread, type SpreadRow } from './spread-rows.js';
import { median, round, type Sampled, sampled } from './stats.js';

export interface FanoutRow {
  readonly name: string;
  readonly clones: number;
  readonly hosts: number;
  readonly spread: {
    readonly pauseMs: Sampled;
    readonly firstFromStopMs: Sampled;
    readonly lastFromStopMs: Sampled;
    readonly lastFromRequestMs: Sampled;
    readonly totalMs: Sampled;
    /** Bytes that the root has sent. */
    readonly egressBytes: Sampled;
  };
  /** Bad pages in the clones that were checked; null for restores, whose guests are not asked. */
  readonly badPages: number | null;
  /** Medians of the steps, which tell where the time goes. */
  readonly phases: readonly PhaseTime[];
}

export interface FanoutResult {
  readonly scenario: 'fanout';
  readonly machine: Machine;
  readonly rounds: number;
  readonly scale: { readonly memoryMiB: number; readonly touchMiB: number; readonly clones: number; hosts: number };
  readonly rows: readonly FanoutRow[];
  readonly lazy: { readonly imageMiB: Sampled; readonly touchedMiB: Sampled; readonly wholeMiB: Sampled };
  readonly spread: readonly SpreadRow[];
  readonly badPagesOfParent: number;
  readonly ratios: Readonly<Record<string, number>>;
  readonly figures: Readonly<Record<string, number>>;
}

const MIB = 2 ** 20;

export function forkRow(name: string, hosts: number, trials: readonly FanoutTrial[]): FanoutRow {
  const of = (pick: (trial: FanoutTrial) => number) => sampled(trials.map((trial) => round(pick(trial), 3)));
  const names = [...new Set(trials.flatMap(({ report }) => report.phases.map((phase) => phase.name)))];
  const msOf = ({ report }: FanoutTrial, phase: string) =>
    report.phases.find((candidate) => candidate.name === phase)?.ms ?? 0;
  return {
    name,
    clones: trials[0]?.report.clones.length ?? 0,
    hosts,
    spread: {
      pauseMs: of(({ report }) => report.parentPauseMs),
      firstFromStopMs: of((trial) => trial.firstFromStopMs),
      lastFromStopMs: of((trial) => trial.lastFromStopMs),
      lastFromRequestMs: of(({ report }) => report.lastReadyMs),
      totalMs: of(({ report }) => report.totalMs),
      egressBytes: of(({ report }) => report.bytes.rootEgress),
    },
    badPages: trials.reduce((sum, { badPages }) => sum + badPages, 0),
    phases: names.map((phase) => ({ name: phase, ms: round(median(trials.map((trial) => msOf(trial, phase))), 1) })),
  };
}

export function restoreRow(name: string, clones: number, hosts: number, runs: readonly CopiedRun[]): FanoutRow {
  const of = (pick: (run: CopiedRun) => number) => sampled(runs.map((run) => round(pick(run), 3)));
  return {
    name,
    clones,
    hosts,
    spread: {
      pauseMs: of(({ savedMs }) => savedMs),
      // The guest stops when it is asked for.
      firstFromStopMs: of(({ firstMs }) => firstMs),
      lastFromStopMs: of(({ lastMs }) => lastMs),
      lastFromRequestMs: of(({ lastMs }) => lastMs),
      totalMs: of(({ lastMs }) => lastMs),
      egressBytes: of(({ stateBytes }) => stateBytes * (hosts - 1)),
    },
    badPages: null,
    phases: [
      { name: 'save', ms: round(median(runs.map(({ savedMs }) => savedMs)), 1) },
      { name: 'copy', ms: round(median(runs.map(({ copiedMs, savedMs }) => copiedMs - savedMs)), 1) },
    ],
  };
}

export function lazyOf(trials: readonly LazyTrial[]): FanoutResult['lazy'] & { readonly ratio: number } {
  const of = (pick: (trial: LazyTrial) => number) => sampled(trials.map((trial) => round(pick(trial) / MIB, 1)));
  return {
    imageMiB: of((trial) => trial.imageBytes),
    touchedMiB: of((trial) => trial.touchedBytes),
    wholeMiB: of((trial) => trial.wholeBytes),
    ratio: round(median(trials.map((trial) => trial.imageBytes / trial.touchedBytes)), 3),
  };
}

const COLUMNS = [
  'row',
  'clones',
  'hosts',
  'parent pause ms',
  'first / last resumed ms after the stop',
  'last resumed ms after the request',
  'total ms',
  'MiB sent by the root',
  'bad pages',
];

export function rowText({ name, clones, hosts, spread, badPages }: FanoutRow): string {
  const span = ({ median: middle, min, max }: Sampled, digits = 0) =>
    min === max ? `${round(middle, digits)}` : `${round(middle, digits)} (${round(min, digits)}–${round(max, digits)})`;
  const cells = [
    ...[name, clones, hosts, span(spread.pauseMs, 1)],
    `${span(spread.firstFromStopMs)} / ${span(spread.lastFromStopMs)}`,
    ...[span(spread.lastFromRequestMs), span(spread.totalMs), round(spread.egressBytes.median / MIB, 0)],
    badPages ?? '–',
  ];
  return `| ${cells.join(' | ')} |`;
}

export function printFanout(result: FanoutResult): string {
  const { machine, rounds, scale, rows, lazy, spread, badPagesOfParent, ratios, figures } = result;
  const steps = rows.map(({ name, clones, phases }) => {
    const times = phases.map((phase) => `${phase.name} ${phase.ms}`);
    return `${name}, ${clones} clones: ${times.join(', ')}`;
  });
  return [
    describeRun(machine, rounds),
    `${scale.memoryMiB} MiB, ${scale.touchMiB} MiB of them busy; ${scale.clones} clones on ${scale.hosts} hosts`,
    '',
    `| ${COLUMNS.join(' | ')} |`,
    `|${' --- |'.repeat(COLUMNS.length)}`,
    ...rows.map(rowText),
    '',
    `lazy, ${scale.hosts - 1} hosts: images of ${lazy.imageMiB.median} MiB in all, ` +
      `touched ${lazy.touchedMiB.median} MiB; a whole image has ${lazy.wholeMiB.median} MiB`,
    `bad pages of the parent: ${badPagesOfParent}`,
    '',
    'steps in ms (medians):',
    ...steps.map((line) => `- ${line}`),
    '',
    ...printSpread(spread),
    '',
    '| ratio or figure | value |',
    '| --- | --- |',
    ...Object.entries({ ...ratios, ...figures }).map(([name, value]) => `| ${name} | ${value} |`),
  ].join('\n');
}

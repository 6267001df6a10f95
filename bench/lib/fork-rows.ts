/** The rows of the `vfork` benchmark, and the ratios made from them. */
import { describeMachine, type Machine } from './machine.js';
import { median, round } from './stats.js';

export interface ForkRow {
  readonly name: string;
  readonly parentMiB: number;
  readonly clones: number;
  /** null if the parent was saved beforehand. */
  readonly parentPauseMs: number | null;
  /**
   * null if the parent was saved beforehand, or if parent and clones outnumber the processors, because then the parent
   * cannot reach its former speed.
   */
  readonly parentBackMs: number | null;
  readonly firstMs: number;
  readonly lastMs: number;
  /** Time until the first clone has reported work of its own. */
  readonly firstWorkMs: number;
  /** Time of the whole job, until the image is complete and recorded; for restores the same as lastMs. */
  readonly totalMs: number;
  readonly privateMiBPerClone: number;
  readonly privateMiBPerCloneLater: number;
  /** Memory that all clones share (image or template); 0 for full restores. */
  readonly sharedMiB: number;
  readonly faultsPerClone: number;
  /** CPU time of the daemon and of the QEMUs without their vCPUs, until the last clone has resumed. */
  readonly cpuMsPerClone: number;
  /** Bad pages in the whole memory of the parent; null if it was saved beforehand. */
  readonly badPagesParent: number | null;
  /** Bad pages in the whole memory of all clones; for restores those that the guests saw while they worked. */
  readonly badPagesClones: number;
  /**
   * Number of clones whose index, UUID, generation id and random numbers no other clone has; null for restores, which
   * all equal their parent.
   */
  readonly distinctClones: number | null;
}

export interface VforkResult {
  readonly scenario: 'vfork';
  readonly machine: Machine;
  readonly rows: readonly ForkRow[];
  readonly ratios: Record<string, number>;
  readonly figures: Record<string, number>;
}

/** `smallMiB` and `bigMiB` are the memory sizes of the parents; `most` is the number of clones in the ratios. */
export function resultOf(
  rows: readonly ForkRow[],
  { smallMiB, bigMiB, most }: { smallMiB: number; bigMiB: number; most: number },
  machine = describeMachine(),
): VforkResult {
  const row = (name: string) =>
    rows.find((one) => one.name === name && one.parentMiB === smallMiB && one.clones === most);
  const memory = (one: ForkRow | undefined) =>
    one === undefined ? Number.NaN : one.privateMiBPerClone * one.clones + one.sharedMiB;
  const middle = (parentMiB: number, pick: (one: ForkRow) => number | null) =>
    median(rows.filter((one) => one.parentMiB === parentMiB).flatMap((one) => pick(one) ?? []));
  const pauseMs = (parentMiB: number) => middle(parentMiB, (one) => one.parentPauseMs);
  const backMs = (parentMiB: number) => middle(parentMiB, (one) => one.parentBackMs);
  const [full, warm, cold] = [row('qemu-full'), row('ours-warm'), row('ours-cold')];
  const of = (value: number | undefined, digits = 2) => round(value ?? Number.NaN, digits);
  return {
    scenario: 'vfork',
    machine,
    rows,
    ratios: {
      pause2GOver256M: of(pauseMs(bigMiB) / pauseMs(smallMiB)),
      [`timeOverFullRestore${most}`]: of((warm?.lastMs ?? Number.NaN) / (full?.lastMs ?? Number.NaN), 3),
      [`memoryOverFullRestore${most}`]: of(memory(warm) / memory(full), 3),
    },
    figures: {
      parentPauseMs: of(pauseMs(smallMiB)),
      parentBackMs: of(backMs(smallMiB), 0),
      parentBack2GMs: of(backMs(bigMiB), 0),
      [`warm${most}Ms`]: of(warm?.lastMs, 0),
      [`cold${most}Ms`]: of(cold?.lastMs, 0),
      privateMiBPerClone: of(warm?.privateMiBPerClone),
      cpuMsPerClone: of(warm?.cpuMsPerClone),
    },
  };
}

const COLUMNS = [
  'row',
  'parent MiB',
  'clones',
  'parent pause ms',
  'parent back ms',
  'first / last resumed ms',
  'first work ms',
  'total ms',
  'private MiB each, at resume / 5 s later',
  'shared MiB',
  'page faults each',
  'CPU ms each',
  'bad pages, parent / clones',
  'distinct clones',
];

export function printVfork({ machine, rows, ratios, figures }: VforkResult): string {
  return [
    `${machine.cpu}, ${machine.cores} cores, ${machine.memoryMiB} MiB, Linux ${machine.kernel}; one run`,
    '',
    `| ${COLUMNS.join(' | ')} |`,
    `|${' --- |'.repeat(COLUMNS.length)}`,
    ...rows.map(rowText),
    '',
    '| ratio or figure | value |',
    '| --- | --- |',
    ...Object.entries({ ...ratios, ...figures }).map(([name, value]) => `| ${name} | ${value} |`),
  ].join('\n');
}

export function rowText(one: ForkRow): string {
  const orDash = (value: number | null, digits = 0) => (value === null ? '–' : `${round(value, digits)}`);
  const cells = [
    one.name,
    one.parentMiB,
    one.clones,
    orDash(one.parentPauseMs, 1),
    orDash(one.parentBackMs),
    `${round(one.firstMs, 0)} / ${round(one.lastMs, 0)}`,
    round(one.firstWorkMs, 0),
    round(one.totalMs, 0),
    `${round(one.privateMiBPerClone, 1)} / ${round(one.privateMiBPerCloneLater, 1)}`,
    round(one.sharedMiB, 0),
    round(one.faultsPerClone, 0),
    round(one.cpuMsPerClone, 1),
    `${orDash(one.badPagesParent)} / ${one.badPagesClones}`,
    orDash(one.distinctClones),
  ];
  return `| ${cells.join(' | ')} |`;
}

/** The rows of `fanout` about the links: what each way to spread an image costs. */
import { RELAY_DEGREE } from '../../src/planner/fork/fanout.js';
import { SPREAD, SPREAD_KINDS, type SpreadKind, type SpreadTrial } from './spread-side.js';
import { median, round, type Sampled, sampled } from './stats.js';

type KindName = (typeof SPREAD_KINDS)[number]['name'];
export type SpreadTrials = { readonly [Name in KindName]: SpreadTrial[] };

export interface SpreadRow {
  readonly name: string;
  readonly hosts: number;
  readonly spread: {
    readonly fillMs: Sampled;
    /** Over the bytes of the image that are not zero. */
    readonly rootSentOverImage: Sampled;
    readonly maxUplinkOverImage: Sampled;
    readonly repairOverImage: Sampled;
    readonly relayedOverImage: Sampled;
    readonly maxLoss: Sampled;
  };
  readonly badPages: number;
}

export function noTrials(): SpreadTrials {
  return Object.fromEntries(SPREAD_KINDS.map(({ name }) => [name, []])) as unknown as SpreadTrials;
}

export function spreadRow({ name, hostCount }: SpreadKind, trials: readonly SpreadTrial[]): SpreadRow {
  const of = (pick: (trial: SpreadTrial) => number) => sampled(trials.map((trial) => round(pick(trial), 3)));
  return {
    name,
    hosts: hostCount,
    spread: {
      fillMs: of(({ fillMs }) => fillMs),
      rootSentOverImage: of(({ rootSentBytes, imageBytes }) => rootSentBytes / imageBytes),
      maxUplinkOverImage: of(({ maxUplinkBytes, imageBytes }) => maxUplinkBytes / imageBytes),
      repairOverImage: of(({ bytes, imageBytes }) => bytes.repair / imageBytes),
      relayedOverImage: of(({ bytes, imageBytes }) => bytes.relayed / imageBytes),
      maxLoss: of(({ maxLoss }) => maxLoss),
    },
    badPages: trials.reduce((sum, { badPages }) => sum + badPages, 0),
  };
}

export function spreadRatios(trials: SpreadTrials): Record<string, number> {
  const over = (pick: (trial: SpreadTrial) => number, name: KindName, base?: KindName) => {
    const value = median(trials[name].map(pick));
    return round(base === undefined ? value : value / median(trials[base].map(pick)), 3);
  };
  const rootEgress = ({ rootSentBytes, imageBytes }: SpreadTrial) => rootSentBytes / imageBytes;
  const uplink = ({ maxUplinkBytes, imageBytes }: SpreadTrial) => maxUplinkBytes / imageBytes;
  const fill = ({ fillMs }: SpreadTrial) => fillMs;
  return {
    rootEgressMulticast: over(rootEgress, 'multicast'),
    rootEgressTreeOverDegree: round(over(rootEgress, 'tree') / RELAY_DEGREE, 3),
    multicast8OverUnicast1: over(fill, 'multicast', 'unicast, one host'),
    loss10Over0: over(fill, 'multicast, 10 % lost', 'multicast'),
    maxLinkOverImage: Math.max(over(uplink, 'multicast'), over(uplink, 'tree')),
  };
}

const COLUMNS = [
  'fan-out',
  'hosts',
  'all have the image after ms',
  'root has sent × image',
  'busiest uplink × image',
  'repaired × image',
  'relayed × image',
  'worst loss',
  'bad pages',
];

export function spreadText({ name, hosts, spread, badPages }: SpreadRow): string {
  const span = ({ median: middle, min, max }: Sampled, digits: number) =>
    min === max ? `${round(middle, digits)}` : `${round(middle, digits)} (${round(min, digits)}–${round(max, digits)})`;
  const { fillMs, rootSentOverImage, maxUplinkOverImage, repairOverImage, relayedOverImage, maxLoss } = spread;
  const cells = [
    ...[name, hosts, span(fillMs, 0), span(rootSentOverImage, 2), span(maxUplinkOverImage, 2)],
    ...[span(repairOverImage, 2), span(relayedOverImage, 2), span(maxLoss, 3), badPages],
  ];
  return `| ${cells.join(' | ')} |`;
}

export function printSpread(rows: readonly SpreadRow[]): string[] {
  const { hosts, racks, memoryMiB, touchMiB, mbitPerS } = SPREAD;
  return [
    `links of ${mbitPerS} Mbit/s, ${hosts} hosts and the root in ${racks} racks; ` +
      `${memoryMiB} MiB, ${touchMiB} MiB of them written; the guest rests`,
    '',
    `| ${COLUMNS.join(' | ')} |`,
    `|${' --- |'.repeat(COLUMNS.length)}`,
    ...rows.map(spreadText),
  ];
}

/** Formats forks, images and waiting processes for a person, as render.ts does for the rest. */

import { MigrationError } from '../domain/errors.js';
import type { FanoutPlan, MulticastProvider } from '../domain/fanout.js';
import type { ForkPlan, ForkReport, WarmSetView } from '../domain/fork.js';
import type { FlattenReport, ImageRemoval, ImageView, KeptLayer, PruneReport } from '../domain/image.js';
import type { Refusal } from '../domain/refusal.js';
import { levelLines } from './error-text.js';
import { bytes, milliseconds, plain, table } from './render.js';

const FAILURES_SHOWN_MAX = 10;
const CLONES_SHOWN_MAX = 16;

export function forkReportText(report: ForkReport): string {
  const { clones, failures, faults } = report;
  const lines: readonly (readonly [string, string])[] = [
    // Clones of an existing image stop no parent.
    ...(report.parentPauseMs === 0 ? [] : [['pause', `${milliseconds(report.parentPauseMs)} (parent)`] as const]),
    ['first', milliseconds(report.firstReadyMs)],
    ['last', milliseconds(report.lastReadyMs)],
    ['total', milliseconds(report.totalMs)],
    ['image', `${report.image}: ${imageBytesText(report.bytes)}`],
    ...hostBytesLines(report),
    ...(report.coldReason === undefined ? [] : [['cold', report.coldReason] as const]),
    ['faults', `${faults.parent} of the parent, ${faults.clones} of the clones`],
  ];
  const warmth = report.isWarm ? 'warm' : 'cold';
  const cloneCount = clones.length === 1 ? '1 clone' : `${clones.length} clones`;
  const head = `${report.parent}: ${cloneCount}, ${bytes(report.memoryBytes)}, ${warmth}`;
  const shown = clones.slice(0, CLONES_SHOWN_MAX);
  const rows = shown.map((clone) => [
    clone.name,
    clone.host,
    clone.uuid,
    clone.mac ?? '-',
    milliseconds(clone.readyMs),
  ]);
  const more = clones.length > shown.length ? `  and ${clones.length - shown.length} more: vmctl ps\n` : '';
  return [
    `${plain(head)}\n`,
    ...lines.map(([name, text]) => `  ${name.padEnd(10)} ${plain(text)}\n`),
    indented(table(['NAME', 'HOST', 'UUID', 'MAC', 'READY'], rows)),
    more,
    failureText(failures),
  ].join('');
}

function imageBytesText({ copied, zeroSkipped, deviceState }: ForkReport['bytes']): string {
  return `${bytes(copied)} copied, ${bytes(zeroSkipped)} known to be zero, device state ${bytes(deviceState)}`;
}

/** What the other hosts have read of the image. */
function hostBytesLines({ bytes: sent, fanout }: ForkReport): (readonly [string, string])[] {
  const { perHost, rootEgress, multicast, repair, relayed } = sent;
  const hosts = Object.keys(perHost);
  if (hosts.length < 2) return [];
  const lines: (readonly [string, string])[] = [
    ['hosts', `${hosts.length}; ${bytes(rootEgress)} sent to ${hosts.length - 1} of them`],
  ];
  if (fanout === undefined || fanout.kind === 'unicast') return lines;
  const worst = Object.entries(fanout.lossPerHost).sort(([, one], [, other]) => other - one)[0];
  const loss = worst === undefined || worst[1] === 0 ? '' : `; ${worst[0]} lost ${(100 * worst[1]).toFixed(1)} %`;
  const how =
    fanout.kind === 'tree'
      ? `${bytes(relayed)} through relays`
      : `${bytes(multicast)} once to all, ${bytes(repair)} repaired${loss}`;
  return [...lines, ['fan-out', `${fanoutText(fanout)}: ${how}`]];
}

function fanoutText({ kind, provider }: Pick<FanoutPlan, 'kind' | 'provider'>): string {
  return provider === undefined ? kind : `${kind} by ${PROVIDER_TITLES[provider]}`;
}

const PROVIDER_TITLES = { udp: 'UDP', verbs: 'RDMA' } as const satisfies Record<MulticastProvider, string>;

/** Lists the clones that do not run: they could not be started, have ended, or are damaged. */
export function failureText(failures: ForkReport['failures']): string {
  const shown = failures.slice(0, FAILURES_SHOWN_MAX).map(({ name, error, host }) => {
    const why = MigrationError.from(error ?? new Error('no reason given'), 'the agent').toJSON();
    const where = host === undefined ? '' : ` (${host})`;
    return `  ${plain(name + where)}: ${levelLines(why).join(': ')}\n`;
  });
  const more = failures.length > shown.length ? `  and ${failures.length - shown.length} more\n` : '';
  return failures.length === 0 ? '' : `not running:\n${shown.join('')}${more}`;
}

export function forkPlanText(plan: ForkPlan): string {
  const { request } = plan;
  const head = [
    `${plan.parent}: ${clonesText(request.cloneCount)} on ${hostsText(plan)}`,
    bytes(plan.memoryBytes),
    `memory ${request.memory}`,
    `network ${request.network}`,
    `disks ${request.disks}`,
  ].join(', ');
  const steps = plan.steps.map(
    (step, index) =>
      `  ${String(index + 1).padStart(2)}. ${step.isInPause ? '■' : ' '} ${plain(`${step.host}: ${step.text}`)}\n`,
  );
  const shares = (plan.shares ?? []).map(({ host, first, count }) => {
    const which = count === 0 ? 'no clones' : count === 1 ? `clone ${first}` : `clones ${first}-${first + count - 1}`;
    return `  ${plain(`${host}: ${which}${host === plan.host ? `, the host of ${plan.parent}` : ''}`)}\n`;
  });
  const by =
    plan.transport === undefined ? [] : [`  transport: ${plan.transport} (${plain(plan.transportReason ?? '')})\n`];
  const fan =
    plan.fanout === undefined ? [] : [`  fan-out: ${fanoutText(plan.fanout)} (${plain(plan.fanout.reason)})\n`];
  const notes = plan.notes.map((note) => `  note: ${plain(note)}\n`);
  const legend = plan.steps.some(({ isInPause }) => isInPause) ? '  ■: the parent does not run\n' : '';
  return `${plain(head)}\n${shares.join('')}${by.join('')}${fan.join('')}${steps.join('')}${notes.join('')}${legend}`;
}

const clonesText = (count: number): string => (count === 1 ? '1 clone' : `${count} clones`);

function hostsText({ host, shares }: ForkPlan): string {
  const hosts = (shares ?? []).filter(({ count }) => count > 0).map((share) => share.host);
  if (hosts.length === 0) return host;
  return hosts.length === 1 ? (hosts[0] ?? host) : `${hosts.length} hosts`;
}

export function imageTable(images: readonly ImageView[]): string {
  const problems = images.flatMap(({ id, problem }) => (problem === undefined ? [] : [`${id}: ${plain(problem)}\n`]));
  return imageRows(images) + problems.join('');
}

function imageRows(images: readonly ImageView[]): string {
  return table(
    ['IMAGE', 'STATE', 'PARENT', 'MEMORY', 'TAKES', 'CLONES', 'MADE'],
    images.map((image) => [
      image.id,
      image.state === 'filling' && image.pagesTotal > 0
        ? `filling ${Math.floor((100 * image.pagesDone) / image.pagesTotal)} %`
        : image.state,
      image.parent,
      bytes(image.memoryBytes),
      bytes(image.allocatedBytes),
      String(image.clones.length),
      image.createdAt,
    ]),
  );
}

export function removalText({ id, freedBytes, mergedDisks, keptLayers }: ImageRemoval): string {
  const isGone = keptLayers.length === 0;
  const head = `${isGone ? 'removed' : 'unloaded'} image ${id}: freed ${bytes(freedBytes)} of memory\n`;
  const hint =
    '  The next "vmctl image rm" removes what nobody needs; --drop-saved gives up saved files, --force other hosts.\n';
  return [head, ...mergedDisks.map(mergedText), ...keptLayers.map(keptText), isGone ? '' : hint].join('');
}

export function pruneText({ removed, kept, freedBytes }: PruneReport, isDryRun: boolean): string {
  const verb = isDryRun ? 'would remove' : 'removed';
  return [
    ...removed.map((image) => `${verb} image ${image.id}: ${bytes(image.freedBytes)}\n`),
    ...kept.map(({ id, reason }) => `kept image ${id}: ${plain(reason)}\n`),
    `${isDryRun ? 'would free' : 'freed'} ${bytes(freedBytes)} of memory\n`,
  ].join('');
}

export function flattenText({ vm, mergedDisks, keptLayers }: FlattenReport): string {
  const isFlat = mergedDisks.length === 0 && keptLayers.length === 0;
  const head = isFlat ? `${plain(vm)} has no overlays of forks\n` : `${plain(vm)}:\n`;
  return [head, ...mergedDisks.map(mergedText), ...keptLayers.map(keptText)].join('');
}

const mergedText = (path: string): string => `  merged ${plain(path)} into its backing file\n`;
const keptText = ({ path, reason }: KeptLayer): string => `  kept ${plain(path)}: ${plain(reason)}\n`;

export function poolTable(sets: readonly WarmSetView[]): string {
  return table(
    ['VM', 'CLONES', 'READY', 'MEMORY', 'NETWORK', 'DISKS', 'NAMES', 'IMAGE'],
    sets.map((set) => [
      set.vm,
      String(set.cloneCount),
      String(set.readyCount),
      set.memory,
      set.network,
      set.disks,
      set.namePrefix ?? '-',
      set.image,
    ]),
  );
}

/** How each clone ended, for `vfork --wait`. */
export interface CloneEnd {
  readonly name: string;
  readonly index: number;
  /** null: the clone reported none. */
  readonly exitCode: number | null;
  readonly reason: string;
  /** Path of the file with the clone's serial log. */
  readonly log: string | null;
}

export type DryRunAnswer = { readonly plan: ForkPlan | null; readonly refusals: readonly Refusal[] };

/** Formats a record, one line for each member. */
export function recordText(record: object): string {
  const text = (value: unknown): string =>
    typeof value === 'string' ? value : value === null ? '-' : JSON.stringify(value);
  return table(
    ['', ''],
    Object.entries(record).map(([key, value]) => [key, text(value)]),
  ).trimStart();
}

function indented(text: string): string {
  return text.replace(/^(?=.)/gm, '  ');
}

/** Formats tables, the progress line and reports for a person. terminal.ts decides where the text goes. */

import { guestEndText } from '../domain/guest-end.js';
import { isEnded, type JobView } from '../domain/job.js';
import { type MigrationPlan, type MigrationReport, MODE_TRAITS } from '../domain/migration.js';
import type { Refusal } from '../domain/refusal.js';
import type { MemoryVerification } from '../domain/verification.js';
import type { VmView } from '../domain/vm.js';
import type { HostView } from '../schemas/host.js';

/** The planner's reason for a transport that the user has named. */
const ASKED_FOR = 'asked for';
const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'] as const;

export function bytes(amount: number): string {
  let value = amount;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

export function milliseconds(ms: number): string {
  if (ms >= 10_000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

export function microseconds(us: number): string {
  return us >= 1000 ? milliseconds(us / 1000) : `${Math.round(us)} µs`;
}

/**
 * Formats a table: each column is as wide as its widest cell, the last one is not padded. Control characters do not
 * reach the terminal.
 */
export function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const cells = [head, ...rows].map((row) => row.map(plain));
  const widths = head.map((_, column) => Math.max(...cells.map((row) => row[column]?.length ?? 0)));
  return cells
    .map((row) =>
      row.map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd(widths[column] ?? 0))).join('  '),
    )
    .map((line) => `${line.trimEnd()}\n`)
    .join('');
}

/** Puts text that comes from elsewhere (names, reasons) on one line, without control characters. */
export function plain(text: string): string {
  // oxlint-disable-next-line no-control-regex
  return text.replace(/[\u0000-\u001f\u007f-\u009f]+/g, ' ');
}

/**
 * Returns the state; of a VM that has ended also how; the guest's exit code, if it has reported one; and the move that
 * is under way.
 */
function stateText(vm: VmView): string {
  const { exitCode, exit } = vm;
  const state = vm.damage === undefined || exit !== null ? vm.state : 'damaged';
  const code = exit?.exitCode ?? exitCode;
  const how = exit === null || exit.reason === state ? state : `${state}: ${exit.reason}`;
  return [code === null ? how : `${how} (${code})`, ...Object.values(moveTexts(vm))].join(', ');
}

/** Describes the move that is under way, by the name of its field. */
export function moveTexts({ arriving, leaving }: VmView): { arriving?: string; leaving?: string } {
  const text = (way: string, { percent, isStalled }: { percent: number | null; isStalled: boolean }): string =>
    `${way}${percent === null ? '' : `, ${percent} %`}${isStalled ? ', stalled' : ''}`;
  return {
    ...(arriving === undefined ? {} : { arriving: text(`arriving from ${arriving.source}`, arriving) }),
    ...(leaving === undefined ? {} : { leaving: text(`leaving for ${leaving.target}`, leaving) }),
  };
}

export function vmTable(vms: readonly VmView[]): string {
  const notices = vms.flatMap(({ name, notice, damage }) =>
    [notice, damage].flatMap((text) => (text === undefined ? [] : [`${plain(name)}: ${plain(text)}\n`])),
  );
  return vmRows(vms) + notices.join('');
}

function vmRows(vms: readonly VmView[]): string {
  return table(
    ['NAME', 'STATE', 'HOST', 'MEMORY', 'ACCEL', 'PID', 'EPOCH', 'JOB', 'IMAGE'],
    vms.map((vm) => [
      vm.name,
      stateText(vm),
      vm.host,
      bytes(vm.memoryBytes),
      vm.accel,
      vm.pid === null ? '-' : String(vm.pid),
      String(vm.epoch),
      vm.job ?? '-',
      vm.image ?? '-',
    ]),
  );
}

export function hostTable(hosts: readonly HostView[]): string {
  return table(
    ['HOST', 'STATE', 'QEMU', 'ACCEL', 'FREE', 'VMS', 'URL'],
    hosts.map(({ host, isSelf, isReachable, error, inventory, url }) => [
      host,
      isSelf ? 'this host' : isReachable ? 'reachable' : (error?.code ?? 'unreachable'),
      inventory?.qemuVersion ?? '-',
      inventory === null ? '-' : inventory.isKvmUsable ? 'kvm' : 'tcg',
      inventory === null ? '-' : bytes(inventory.ramFileFreeBytes),
      inventory === null ? '-' : String(inventory.vmNames.length),
      url ?? '-',
    ]),
  );
}

export function jobTable(jobs: readonly JobView[]): string {
  return table(
    ['JOB', 'VM', 'FROM', 'TO', 'STATE', 'STEP', 'STOPPED', 'STARTED'],
    jobs.map((job) => [
      job.id,
      job.vm,
      job.source,
      job.kind === 'fork' ? `${job.cloneCount} clones` : job.target,
      job.state,
      job.step ?? '-',
      stoppedTime(job),
      job.createdAt,
    ]),
  );
}

/** Returns the blackout of a migrated VM, or the pause of a fork's parent. */
function stoppedTime(job: JobView): string {
  if (job.report === null) return '-';
  return milliseconds(job.kind === 'fork' ? job.report.parentPauseMs : job.report.blackoutMs);
}

/**
 * Returns one line for a job: step and pages; while pages move also rate, time left and page faults. What has ended has
 * no rate and no time left.
 */
export function progressLine(job: JobView): string {
  const waitsFor = job.kind === 'fork' && job.waitsFor !== null ? `, waits for ${job.waitsFor}` : '';
  const head = `${job.vm}: ${job.state === 'recovering' ? 'recovering, ' : ''}${job.step ?? job.state}${waitsFor}`;
  const { progress } = job;
  if (progress === null || progress.pagesTotal === 0) return plain(head);
  const percent = Math.floor((100 * progress.pagesDone) / progress.pagesTotal);
  const pages = `${progress.pagesDone}/${progress.pagesTotal} pages ${percent} %`;
  if (isEnded(job.state)) return plain(`${head}  ${pages}`);
  const left = progress.secondsLeft === null ? '' : `, ${Math.ceil(progress.secondsLeft)} s left`;
  return plain(`${head}  ${pages}, ${bytes(progress.bytesPerS)}/s${left}, ${progress.faultCount} faults`);
}

/** The same, and a line for each host of a fork over several hosts. */
export function progressLines(job: JobView): string[] {
  const hosts = job.progress?.hosts ?? [];
  const width = Math.max(0, ...hosts.map(({ host }) => host.length));
  return [
    progressLine(job),
    ...hosts.map(({ host, state, pagesTotal, pagesDone, bytesDone }) => {
      const percent = pagesTotal === 0 ? 0 : Math.floor((100 * pagesDone) / pagesTotal);
      return plain(
        `  ${host.padEnd(width)}  ${state.padEnd(8)}  ${String(percent).padStart(3)} %, ${bytes(bytesDone)}`,
      );
    }),
  ];
}

export function reportText(report: MigrationReport): string {
  const { bytes: moved, faults, guestEnd = null } = report;
  const movedBytes = moved.push + moved.demand + moved.prefetch + moved.deviceState;
  const kinds = [
    `push ${bytes(moved.push)}${passesText(report)}`,
    `demand ${bytes(moved.demand)}`,
    `prefetch ${bytes(moved.prefetch)}`,
    `device state ${bytes(moved.deviceState)}`,
  ];
  const latencies = [
    `p50 ${microseconds(faults.p50Us)}`,
    `p99 ${microseconds(faults.p99Us)}`,
    `max ${microseconds(faults.maxUs)}`,
  ];
  const isMeasured = MODE_TRAITS[report.mode].mover === 'pager';
  const lines: readonly (readonly [string, string])[] = [
    ['blackout', milliseconds(report.blackoutMs)],
    ['degraded', isMeasured ? milliseconds(report.degradedMs) : '-'],
    ['total', milliseconds(report.totalMs)],
    ['faults', isMeasured ? `${faults.count}, ${latencies.join(', ')}` : '-'],
    isMeasured
      ? ['moved', `${bytes(movedBytes)} (${kinds.join(', ')}), ${bytes(moved.zeroSkipped)} known to be zero`]
      : ['moved', `${bytes(movedBytes)} by QEMU`],
    ['CPU', isMeasured ? `source ${report.sourceCpuS.toFixed(2)} s, target ${report.targetCpuS.toFixed(2)} s` : '-'],
    ...(report.dataSecurity === undefined ? [] : [['security', report.dataSecurity] as const]),
    ...(report.verified === undefined ? [] : [['memory', verifiedText(report.verified)] as const]),
    ...(report.sharedStorage === 'assume' ? [['storage', 'assumed to be shared, nobody has checked it'] as const] : []),
    ...(guestEnd === null ? [] : [['guest', guestEndText(report.vm, guestEnd)] as const]),
    ...(report.reconnects === 0 ? [] : [['reconnects', String(report.reconnects)] as const]),
  ];
  const route = `${report.source} → ${report.target}`;
  const head = `${report.vm}: ${route}, ${bytes(report.memoryBytes)}, ${modeAndTransport(report)}`;
  return `${plain(head)}\n${lines.map(([name, text]) => `  ${name.padEnd(10)} ${text}\n`).join('')}`;
}

/** The last round is that of the stopped VM. Each of the others followed a pass over what was missing. */
function passesText({ rounds }: MigrationReport): string {
  return rounds < 2 ? '' : rounds === 2 ? ' in 1 pass' : ` in ${rounds - 1} passes`;
}

function verifiedText({ isComplete, chunks, pages, ms, reason }: MemoryVerification): string {
  if (!isComplete) return `NOT verified: ${plain(reason ?? 'unknown')}`;
  return `verified: ${pages} pages in ${chunks} chunks, ${milliseconds(ms)}`;
}

/** Names mode and transport, with the reason for the transport unless the user has chosen it. */
function modeAndTransport({
  mode,
  transport,
  transportReason,
}: Pick<MigrationReport, 'mode' | 'transport' | 'transportReason'>) {
  const isToldWhy = transportReason !== '' && transportReason !== ASKED_FOR;
  return `${mode} over ${transport}${isToldWhy ? ` (${transportReason})` : ''}`;
}

export function planText(plan: MigrationPlan): string {
  const { request } = plan;
  const { mode, transport } = request;
  const how = modeAndTransport({ mode, transport, transportReason: plan.transportReason });
  const head = `${request.vm}: ${plan.source} → ${request.target}, ${bytes(plan.memoryBytes)}, ${how}`;
  const steps = plan.steps.map(
    (step, index) =>
      `  ${String(index + 1).padStart(2)}. ${step.isInBlackout ? '■' : ' '} ${plain(`${step.host}: ${step.text}`)}\n`,
  );
  const notes = plan.notes.map((note) => `  note: ${plain(note)}\n`);
  return `${plain(head)}\n${steps.join('')}${notes.join('')}  ■: the VM does not run\n`;
}

export function refusalText(refusals: readonly Refusal[]): string {
  return refusals
    .map(
      ({ code, reason, remedy }) => `  ${code}: ${plain(reason)}\n${remedy === '' ? '' : `    → ${plain(remedy)}\n`}`,
    )
    .join('');
}

/**
 * `npm run -s bench -- rdma`: moves the same guest with vmigrate and with QEMU, each over RDMA and over tcp, and
 * measures the limits of the device. It runs in the bed, or on this machine if VMIGRATE_RDMA_ADDRESSES=ADDRESS,ADDRESS
 * gives two of its RDMA addresses.
 */
import { runProgramInBed } from '../test/bed/bed.js';
import { runCommand } from '../test/hosts/cluster.js';
import { describeMachine, describeRun, type Machine } from './lib/machine.js';
import { type MoveRow, renderRatios, renderRows } from './lib/rows.js';
import { round } from './lib/stats.js';

const PROGRAM = 'bench/rdma-hosts.ts';
const MIB = 2 ** 20;

/** Medians. Rates are in MiB/s, for READs of 1 MiB. */
export interface Floor {
  /** Time of fault → READ → CONTINUE without a session around it, as the faulting thread sees it. */
  readonly faultP50Us: number;
  /** The same from reading the fault to waking the thread, which is how a session measures its faults. */
  readonly servedP50Us: number;
  readonly bareBulkMibS: number;
  /** Time of a READ of one page by vmigrate's provider. */
  readonly readP50Us: number;
  readonly bulkMibS: number;
  readonly readBwMibS: number;
}

export interface RdmaFigures {
  /** The machine of the RDMA hosts: the bed's guest, or this machine. */
  readonly machine: Machine;
  readonly rounds: number;
  readonly floor: Floor;
  readonly rows: readonly MoveRow[];
  /** Descriptions of QEMU's moves that failed; post-copy over RDMA always fails. */
  readonly outcomes: Readonly<Record<string, string>>;
}

export interface RdmaResult extends RdmaFigures {
  readonly scenario: 'rdma';
  /** null if there is no bed, because the hosts are on this machine. */
  readonly outerMachine: Machine | null;
  readonly ratios: {
    readonly blackoutOverQemuRdma: number;
    readonly demandP50OverFloor: number;
    readonly demandP50OverTcp: number;
    readonly bulkOverReadBw: number;
    readonly sourceCpuOverTcp: number;
  };
}

async function measure(rounds: number, log: (line: string) => void): Promise<RdmaFigures> {
  const addresses = process.env.VMIGRATE_RDMA_ADDRESSES?.split(',') ?? [];
  const args = [String(rounds), ...addresses];
  let output = '';
  if (addresses.length === 2) {
    const run = await runCommand(process.execPath, ['--import', 'tsx', PROGRAM, ...args], 3_600_000);
    output = `${run.stderr}${run.stdout}`;
  } else {
    const limits = { cpus: 2, memory: '2G', timeoutSeconds: 240 + 240 * rounds };
    const run = await runProgramInBed(PROGRAM, args, {
      ...limits,
      onLine: (line) => (line.startsWith('RESULT ') ? undefined : log(line)),
    });
    output = run.output;
  }
  const result = /^RESULT (.*)$/m.exec(output);
  if (!result?.[1]) throw new Error(`no result from ${PROGRAM}:\n${output}`);
  return JSON.parse(result[1]) as RdmaFigures;
}

export async function benchRdma(options: { isQuick: boolean; log: (line: string) => void }): Promise<RdmaResult> {
  const outerMachine = process.env.VMIGRATE_RDMA_ADDRESSES === undefined ? describeMachine() : null;
  const figures = await measure(options.isQuick ? 1 : 3, options.log);
  const named = (name: string): MoveRow => {
    const found = figures.rows.find((candidate) => candidate.name === name);
    if (!found) throw new Error(`${name} was not measured`);
    return found;
  };
  const qemuBlackouts = figures.rows
    .filter(({ name }) => name.startsWith('qemu-rdma'))
    .map(({ blackoutMs }) => blackoutMs);
  const sourceCpuPerMib = ({ sourceCpuS, bytes }: MoveRow): number => sourceCpuS / (bytes / MIB);
  const { floor } = figures;
  const onDemand = named('ours-rdma-on-demand').faultP50Us ?? Number.NaN;
  return {
    scenario: 'rdma',
    outerMachine,
    ...figures,
    ratios: {
      blackoutOverQemuRdma: round(named('ours-rdma').blackoutMs / Math.min(...qemuBlackouts), 3),
      demandP50OverFloor: round(onDemand / floor.servedP50Us, 3),
      demandP50OverTcp: round(onDemand / (named('ours-tcp-on-demand').faultP50Us ?? Number.NaN), 3),
      bulkOverReadBw: round(floor.bulkMibS / floor.readBwMibS, 3),
      sourceCpuOverTcp: round(sourceCpuPerMib(named('ours-rdma')) / sourceCpuPerMib(named('ours-tcp')), 3),
    },
  };
}

/** Returns the lines of a Markdown table about the device without a VM. */
function floorRows(floor: Floor): string[] {
  const { faultP50Us, servedP50Us, readP50Us, bareBulkMibS, bulkMibS, readBwMibS } = floor;
  const fault = 'bare fault → READ → CONTINUE, p50: seen by the guest / from the fault read';
  return [
    '| the device alone | |',
    '| --- | --- |',
    `| ${fault} | ${faultP50Us} / ${servedP50Us} µs |`,
    `| a page by our provider, p50 | ${readP50Us} µs |`,
    `| READs of 1 MiB: bare / our provider / ib_read_bw | ${bareBulkMibS} / ${bulkMibS} / ${readBwMibS} MiB/s |`,
  ];
}

export function printRdma(result: RdmaResult): string {
  const { floor, machine, outerMachine } = result;
  return [
    describeRun(outerMachine ?? machine, result.rounds),
    ...(outerMachine === null ? [] : [`in the bed: ${machine.cores} emulated cores, Linux ${machine.kernel}`]),
    '',
    ...renderRows(result.rows),
    '',
    ...Object.entries(result.outcomes).map(([name, text]) => `${name}: ${text}`),
    '',
    ...floorRows(floor),
    ...renderRatios(result.ratios),
  ].join('\n');
}

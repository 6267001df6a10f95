/**
 * `npm run -s bench -- rdma`: the same guest moved by us over RDMA and over tcp, and by QEMU's own ways over both, and
 * what the device can do at all. In the bed, or, where VMIGRATE_RDMA_ADDRESSES=ADDRESS,ADDRESS names two RDMA addresses
 * of this machine, right here.
 */
import { runProgramInBed } from '../test/bed/bed.js';
import { runCommand } from '../test/hosts/cluster.js';
import { describeMachine, describeRun, type Machine } from './lib/machine.js';
import { type MoveRow, renderRatios, renderRows } from './lib/rows.js';
import { round } from './lib/stats.js';

const PROGRAM = 'bench/rdma-hosts.ts';
const MIB = 2 ** 20;

/** Medians; MiB/s for READs of 1 MiB. */
export interface Floor {
  /** Fault → READ → CONTINUE with nothing around it, as the thread that faults sees it. */
  readonly faultP50Us: number;
  /** The same from the fault read to the thread woken, which is how a session counts its own faults. */
  readonly servedP50Us: number;
  readonly bareBulkMibS: number;
  /** A READ of one page by our provider. */
  readonly readP50Us: number;
  readonly bulkMibS: number;
  readonly readBwMibS: number;
}

export interface RdmaFigures {
  /** Where the RDMA hosts are: the bed's guest, or this machine. */
  readonly machine: Machine;
  readonly rounds: number;
  readonly floor: Floor;
  readonly rows: readonly MoveRow[];
  /** Moves of QEMU's own that failed, in words; post-copy over RDMA always does. */
  readonly outcomes: Readonly<Record<string, string>>;
}

export interface RdmaResult extends RdmaFigures {
  readonly scenario: 'rdma';
  /** null: there is no bed, the hosts are on this machine. */
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
    '| the device alone | |',
    '| --- | --- |',
    `| bare fault → READ → CONTINUE, p50: seen by the guest / from the fault read | ${floor.faultP50Us} / ${floor.servedP50Us} µs |`,
    `| a page by our provider, p50 | ${floor.readP50Us} µs |`,
    `| READs of 1 MiB: bare / our provider / ib_read_bw | ${floor.bareBulkMibS} / ${floor.bulkMibS} / ${floor.readBwMibS} MiB/s |`,
    ...renderRatios(result.ratios),
  ].join('\n');
}

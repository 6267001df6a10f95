/**
 * The measuring half of `bench -- rdma`. It runs where the RDMA hosts are: in the bed, or on a machine with a card
 * whose two addresses are given. Progress goes to stderr; the last line of stdout is the result.
 *
 *   rdma-hosts.ts ROUNDS [ADDRESS ADDRESS]
 */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { BedNetwork } from '../test/hosts/bed-network.js';
import { Cluster, runCommand, sleep } from '../test/hosts/cluster.js';
import { qemuTrial, startBaseline } from './lib/baseline.js';
import { describeMachine } from './lib/machine.js';
import { OurSide, other } from './lib/our-side.js';
import { type QemuMode, QemuPair } from './lib/qemu-pair.js';
import { row, type Trial } from './lib/rows.js';
import { median, round } from './lib/stats.js';
import type { Floor, RdmaFigures } from './rdma.js';

/** The guest is small, so that a move takes seconds even between emulators inside an emulator. */
const GUEST = { memoryMiB: 64, touchMiB: 32, writePercent: 20, image: 'nano' } as const;
/** Prefetch rate (MiB/s) in the rows about faults: the guest asks for most pages before prefetch brings them. */
const SLOW = ['--bandwidth', '4'];
const OURS: Record<string, readonly string[]> = {
  'ours-rdma': ['--postcopy', '--rdma'],
  'ours-tcp': ['--postcopy', '--tcp'],
  'ours-rdma-on-demand': ['--postcopy', '--rdma', ...SLOW],
  'ours-tcp-on-demand': ['--postcopy', '--tcp', ...SLOW],
};
const QEMUS: Record<string, QemuMode> = {
  'qemu-rdma-precopy': 'rdma-precopy',
  'qemu-rdma-pin-all-precopy': 'rdma-pin-all-precopy',
  'qemu-tcp-precopy': 'precopy',
  'qemu-tcp-postcopy': 'postcopy',
};
const TRIES_MAX = 2;
/** The longest move. QEMU's pre-copy never ends if the guest writes faster than the link carries. */
const MOVE_MS = 60_000;
/** Long, because sampling costs an emulated processor too much time. */
const SAMPLE_MS = 400;
/** The longest post-copy of QEMU over RDMA: it hangs, unless it fails at once. */
const POSTCOPY_MS = 20_000;
const READ_BW_TRANSFERS = 48;

const [roundsText = '2', ...addresses] = process.argv.slice(2);
const rounds = Number(roundsText);
const log = (line: string): void => void process.stderr.write(`${line}\n`);
const programs = fileURLToPath(new URL('../build/native/', import.meta.url));

async function must(command: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await runCommand(command, args);
  if (code !== 0) throw new Error(`${command} ended with ${code}\n${stdout}\n${stderr}`);
  return stdout;
}

/** Returns perftest's figure for READs of 1 MiB from the first host by the second, in MiB/s. */
async function readBandwidth(server: string): Promise<number> {
  const common = ['-R', '-s', `${1 << 20}`, '-n', `${READ_BW_TRANSFERS}`, '-F'];
  const serving = must('ib_read_bw', ...common);
  serving.catch(() => undefined);
  await sleep(1500);
  const [output] = await Promise.all([must('ib_read_bw', ...common, server), serving]);
  const [, average] = /^\s*1048576\s+\d+\s+[\d.]+\s+([\d.]+)/m.exec(output) ?? [];
  if (average === undefined) throw new Error(`ib_read_bw printed no bandwidth:\n${output}`);
  return Number(average);
}

/** Measures the device without a VM: bare verbs, vmigrate's provider and perftest, in turn. */
async function measureFloor(): Promise<Floor> {
  const runs: Floor[] = [];
  for (let n = 0; n < Math.max(1, Math.min(rounds, 3)); n++) {
    const bench = JSON.parse(await must(`${programs}verbs_bench`, '1024', '64')) as VerbsBench;
    runs.push({
      faultP50Us: bench.floor.p50Us,
      servedP50Us: bench.floor.servedP50Us,
      bareBulkMibS: bench.bareBulkMibS,
      readP50Us: bench.endpoint.readP50Us,
      bulkMibS: bench.endpoint.bulkMibS,
      readBwMibS: await readBandwidth(bench.serving),
    });
    log(`floor: ${JSON.stringify(runs.at(-1))}`);
  }
  const of = (name: keyof Floor) => round(median(runs.map((run) => run[name])), 1);
  return {
    faultP50Us: of('faultP50Us'),
    servedP50Us: of('servedP50Us'),
    bareBulkMibS: of('bareBulkMibS'),
    readP50Us: of('readP50Us'),
    bulkMibS: of('bulkMibS'),
    readBwMibS: of('readBwMibS'),
  };
}

interface VerbsBench {
  readonly serving: string;
  readonly floor: { readonly p50Us: number; readonly servedP50Us: number };
  readonly bareBulkMibS: number;
  readonly endpoint: { readonly readP50Us: number; readonly bulkMibS: number };
}

const firstLine = (text: string): string => text.split('\n', 1)[0] ?? '';

/** Tries QEMU's own post-copy over RDMA and returns the outcome as text. */
async function tryPostcopy(pair: QemuPair): Promise<string> {
  const baseline = await startBaseline(pair);
  await baseline.qmp.execute('cont');
  await sleep(1500);
  const begun = performance.now();
  const after = (): string => `after ${round((performance.now() - begun) / 1000, 1)} s`;
  try {
    const { target } = await pair.move(baseline, other(baseline.host), 'rdma-postcopy', POSTCOPY_MS);
    await sleep(2000);
    const isAlive = readFileSync(target.serialLog, 'utf8').includes('VMG WORK');
    return `completed ${after()}; the guest ${isAlive ? 'works' : 'does not run'} on the target`;
  } catch (error) {
    const texts = pair.errorTexts().map((text) => text.trim().split('\n').at(-1) ?? '');
    return [`${firstLine((error as Error).message)} (${after()})`, ...texts.filter((text) => text !== '')].join('; ');
  } finally {
    await pair.endAll();
  }
}

async function measure(): Promise<RdmaFigures> {
  const floor = await measureFloor();
  const cluster = await Cluster.on(addresses.length === 2 ? new BedNetwork(2, addresses) : new BedNetwork(2));
  try {
    const ours = await OurSide.start(cluster, { name: 'ours', ...GUEST }, SAMPLE_MS);
    await ours.pause();
    const pair = new QemuPair(cluster, { name: 'baseline', ...GUEST }, SAMPLE_MS);
    let baseline = await startBaseline(pair);
    const trials: Record<string, Trial[]> = {};
    const guestsLost: Record<string, number> = {};
    const outcomes: Record<string, string> = {};
    const note = (name: string, trial: Trial, n: number): void => {
      (trials[name] ??= []).push(trial);
      const { blackoutMs, stallMsMax, totalMs, faultP50Us } = trial;
      const times = Object.entries({ blackout: blackoutMs, stall: stallMsMax, total: totalMs });
      const figures = times.map(([figure, ms]) => `${figure} ${round(ms)} ms`);
      log(`round ${n}/${rounds} ${name}: ${figures.join(', ')}, fault p50 ${faultP50Us} us`);
    };
    for (let n = 1; n <= rounds; n++) {
      await ours.resume();
      for (const [name, flags] of Object.entries(OURS)) {
        const { trial, report } = await ours.move(...flags);
        // Only the CPU time of the threads for pages counts: the rest of the daemon works the same for each transport.
        note(name, { ...trial, sourceCpuS: report.sourceCpuS, targetCpuS: report.targetCpuS }, n);
      }
      await ours.pause();
      for (const [name, mode] of Object.entries(QEMUS)) {
        for (let attempt = 1; ; attempt++) {
          const moved = await qemuTrial(pair, baseline, mode, MOVE_MS).catch((error: unknown) => {
            outcomes[name] = firstLine((error as Error).message);
            log(`${name}: ${outcomes[name]}`);
            return null;
          });
          if (moved?.isAlive) {
            baseline = moved.target;
            note(name, moved.trial, n);
            break;
          }
          if (moved) outcomes[name] = 'a guest did not survive it';
          guestsLost[name] = (guestsLost[name] ?? 0) + 1;
          await pair.endAll();
          baseline = await startBaseline(pair);
          if (attempt === TRIES_MAX) break;
        }
      }
    }
    await pair.endAll();
    outcomes['qemu-rdma-postcopy'] = await tryPostcopy(pair);
    log(`qemu-rdma-postcopy: ${outcomes['qemu-rdma-postcopy']}`);
    await ours.resume();
    const verdict = await ours.guest.verify(ours.host);
    const rows = Object.entries(trials).map(([name, list]) =>
      row(name, list, name.startsWith('ours') ? verdict.bad : 0, guestsLost[name] ?? 0),
    );
    return { machine: describeMachine(), rounds, floor, rows, outcomes };
  } finally {
    await cluster.destroy();
  }
}

const figures = await measure();
process.stdout.write(`\nRESULT ${JSON.stringify(figures)}\n`);

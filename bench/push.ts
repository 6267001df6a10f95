/**
 * `npm run -s bench -- push`: moves a guest by post-copy, hybrid and pre-copy, over tcp and shm, in turn. One guest
 * works all the time, the other rests four fifths of it.
 */
import { EVERYTHING_ALLOWED } from '../src/domain/policy.js';
import { Cluster } from '../test/hosts/cluster.js';
import { lostWorkSumMs } from './lib/lost-work.js';
import { describeMachine, describeRun, type Machine } from './lib/machine.js';
import { OurSide } from './lib/our-side.js';
import { span } from './lib/rows.js';
import { round, type Sampled, sampled } from './lib/stats.js';

const GUEST = { memoryMiB: 512, touchMiB: 256, writePercent: 20 };
const MIB = 2 ** 20;
const PRECOPY = ['--precopy', '--max-downtime', '500'];
/** A guest that works all the time may write too fast for a pre-copy, which would leave it where it is. */
const GUESTS = [
  { name: 'busy', restPercent: 0, modes: { postcopy: ['--postcopy'], hybrid: ['--hybrid'] } },
  { name: 'resting', restPercent: 80, modes: { postcopy: ['--postcopy'], hybrid: ['--hybrid'], precopy: PRECOPY } },
] as const;
const TRANSPORTS = ['tcp', 'shm'] as const;

interface Figures {
  readonly blackoutMs: number;
  readonly lostWorkMs: number;
  readonly lostBeforeMs: number;
  readonly stallMsMax: number;
  readonly totalMs: number;
  readonly pushedMiB: number;
  readonly fetchedAfterMiB: number;
}

export interface PushResult {
  readonly scenario: 'push';
  readonly machine: Machine;
  readonly rounds: number;
  readonly rows: readonly { readonly row: string; readonly figures: Readonly<Record<keyof Figures, Sampled>> }[];
}

export async function benchPush(options: { isQuick: boolean; log: (line: string) => void }): Promise<PushResult> {
  const rounds = options.isQuick ? 2 : 5;
  const config = { security: { allow: EVERYTHING_ALLOWED } };
  const cluster = await Cluster.create({ hostConfigs: { A: config, B: config } });
  const samples = new Map<string, Figures[]>();
  try {
    for (const { name, restPercent, modes } of GUESTS) {
      const side = await OurSide.start(cluster, { name, restPercent, ...GUEST });
      for (let n = 0; n < rounds; n++) {
        for (const transport of TRANSPORTS) {
          for (const [mode, flags] of Object.entries<readonly string[]>(modes)) {
            const row = `${name} ${mode} ${transport}`;
            const figures = await measure(side, `--${transport}`, ...flags);
            samples.set(row, [...(samples.get(row) ?? []), figures]);
            options.log(`${row}: ${JSON.stringify(figures)}`);
          }
        }
      }
      await cluster.must(cluster.vmctl(side.host, 'stop', '--force', name));
    }
    const rows = [...samples].map(([row, taken]) => ({ row, figures: summed(taken) }));
    return { scenario: 'push', machine: describeMachine(), rounds, rows };
  } finally {
    await cluster.destroy();
  }
}

async function measure(side: OurSide, ...flags: string[]): Promise<Figures> {
  const { trial, report } = await side.move(...flags);
  const { push, demand, prefetch } = report.bytes;
  return {
    blackoutMs: round(trial.blackoutMs),
    lostWorkMs: round(lostWorkSumMs(trial.lostWorkMs)),
    lostBeforeMs: round(trial.lostWorkMs.before),
    stallMsMax: round(trial.stallMsMax),
    totalMs: round(trial.totalMs),
    pushedMiB: round(push / MIB),
    fetchedAfterMiB: round((demand + prefetch) / MIB),
  };
}

function summed(taken: readonly Figures[]): Record<keyof Figures, Sampled> {
  const keys = Object.keys(taken[0] ?? {}) as (keyof Figures)[];
  const entries = keys.map((key) => [key, sampled(taken.map((figures) => figures[key]))] as const);
  return Object.fromEntries(entries) as Record<keyof Figures, Sampled>;
}

const HEADS: Readonly<Record<keyof Figures, string>> = {
  blackoutMs: 'blackout ms',
  lostWorkMs: 'lost work ms',
  lostBeforeMs: 'of it before the stop',
  stallMsMax: 'longest stall ms',
  totalMs: 'total ms',
  pushedMiB: 'MiB before the stop',
  fetchedAfterMiB: 'MiB after',
};

export function printPush({ machine, rounds, rows }: PushResult): string {
  const keys = Object.keys(HEADS) as (keyof Figures)[];
  const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;
  return [
    describeRun(machine, rounds),
    '',
    line(['row', ...keys.map((key) => HEADS[key])]),
    line(['---', ...keys.map(() => '---')]),
    ...rows.map(({ row, figures }) => line([row, ...keys.map((key) => span(figures[key]))])),
  ].join('\n');
}

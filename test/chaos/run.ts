/**
 * A chaos run: moves and forks of a guest that checks its memory, with one random fault in each, and after each all
 * that must hold. The seed decides faults, hosts and times; processes and kernel decide the rest, so a seed repeats the
 * plan of a run, not its every event.
 */
import { Guest } from '../hosts/guest.js';
import { Chance } from '../sim/chance.js';
import { FORK_FAULTS, MOVE_FAULTS } from './faults.js';
import { Field } from './field.js';
import { forkRound, moveRound, type RoundEnd, type Timing } from './rounds.js';

const GUEST = { memoryMiB: 160, touchMiB: 48, restPercent: 50 };
/** Most of a move takes place in its first two seconds. */
const DELAY_MS_MAX = 2000;
const LASTING_MS_MAX = 8000;
const BANDWIDTHS_MIB_PER_S = [0, 8, 16, 64];

export interface ChaosOptions {
  readonly seed: number;
  readonly moveCount: number;
  readonly forkCount: number;
  /** Gets a line for each round. */
  readonly say: (line: string) => void;
}

export interface ChaosResult {
  readonly roundCount: number;
  /** How often each fault ended how: "link cut: source → done". */
  readonly outcomes: Readonly<Record<string, number>>;
  /** Rounds after which the guest had to be started again, as the crash tables permit. */
  readonly endedCount: number;
  readonly violations: readonly string[];
}

export async function chaos({ seed, moveCount, forkCount, say }: ChaosOptions): Promise<ChaosResult> {
  const chance = new Chance(seed);
  const rounds = shuffled(chance, [...Array(moveCount).fill('move'), ...Array(forkCount).fill('fork')] as const);
  const outcomes: Record<string, number> = {};
  const violations: string[] = [];
  let endedCount = 0;
  let field = await Field.create();
  let guest: { name: string; home: string } | null = null;
  try {
    for (const [index, kind] of rounds.entries()) {
      guest ??= await start(field, `chaos-${index}`, chance);
      const { plan, play } = draw(chance, kind, field, guest);
      const begunAt = performance.now();
      const head = `${index + 1}/${rounds.length} ${plan}`;
      try {
        const { home, outcome } = await play();
        const key = `${plan.split(',')[0] ?? plan} → ${outcome}`;
        outcomes[key] = (outcomes[key] ?? 0) + 1;
        if (home === null) endedCount++;
        guest = home === null ? null : { name: guest.name, home };
        say(`${head}: ${outcome}, ${home ?? 'ended'} (${((performance.now() - begunAt) / 1000).toFixed(1)} s)`);
      } catch (error) {
        violations.push(`${head}: ${(error as Error).message}`);
        say(`VIOLATION ${violations.at(-1) ?? ''}`);
        // The next round must not pay for this one.
        guest = null;
        await field.destroy();
        field = await Field.create();
      }
    }
  } finally {
    await field.destroy();
  }
  return { roundCount: rounds.length, outcomes, endedCount, violations };
}

async function start(field: Field, name: string, chance: Chance): Promise<{ name: string; home: string }> {
  const home = chance.pick(field.hosts);
  await Guest.start(field.cluster, home, { name, ...GUEST });
  return { name, home };
}

function draw(
  chance: Chance,
  kind: 'move' | 'fork',
  field: Field,
  { name, home }: { name: string; home: string },
): { plan: string; play: () => Promise<RoundEnd> } {
  const timing: Timing = { delayMs: chance.below(DELAY_MS_MAX), lastingMs: 300 + chance.below(LASTING_MS_MAX) };
  const when = `${timing.delayMs} ms after the request, for ${timing.lastingMs} ms`;
  if (kind === 'fork') {
    const fault = chance.pick(FORK_FAULTS);
    // A frozen parent cannot be forked again, so most parents continue.
    const parentMode = chance.below(5) === 0 ? 'stop' : 'continue';
    const plan = `fork: ${fault.name}, parent ${parentMode} on ${home}, ${when}`;
    return { plan, play: () => forkRound(field, name, { ...timing, fault, host: home, parentMode }) };
  }
  const fault = chance.pick(MOVE_FAULTS);
  const target = chance.pick(field.others(home));
  const transport = chance.pick(['tcp', 'shm'] as const);
  const bandwidthMiBPerS = chance.pick(BANDWIDTHS_MIB_PER_S);
  const plan = `move: ${fault.name}, ${home} to ${target} over ${transport} at ${bandwidthMiBPerS} MiB/s, ${when}`;
  const round = { ...timing, fault, source: home, target, transport, bandwidthMiBPerS };
  return { plan, play: () => moveRound(field, name, round) };
}

function shuffled<T>(chance: Chance, items: readonly T[]): T[] {
  const left = [...items];
  return items.map(() => left.splice(chance.below(left.length), 1)[0]!);
}

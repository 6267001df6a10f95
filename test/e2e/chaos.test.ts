/** A short chaos run (test/chaos). The long one is `npm run -s chaos`. */
import { expect, test } from 'vitest';
import { chaos } from '../chaos/run.js';

const SEED = 20;
const [MOVES, FORKS] = [10, 2];

test('moves and forks with a random fault each: nothing is lost, doubled, damaged or left behind', async () => {
  const lines: string[] = [];
  const result = await chaos({ seed: SEED, moveCount: MOVES, forkCount: FORKS, say: (line) => lines.push(line) });
  expect(result.violations, lines.join('\n')).toEqual([]);
  expect(result.roundCount).toBe(MOVES + FORKS);
}, 900_000);

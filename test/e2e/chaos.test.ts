/** A short chaos run (test/chaos). The long one is `npm run -s chaos`. */
import { expect, test } from 'vitest';
import { chaos } from '../chaos/run.js';

const SEED = 20;

test('20 moves and 4 forks with a random fault each: nothing is lost, doubled, damaged or left behind', async () => {
  const lines: string[] = [];
  const result = await chaos({ seed: SEED, moveCount: 20, forkCount: 4, say: (line) => lines.push(line) });
  expect(result.violations, lines.join('\n')).toEqual([]);
  expect(result.roundCount).toBe(24);
}, 900_000);

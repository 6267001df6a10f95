/** `npm run -s chaos -- [--seed N] [--moves N] [--forks N] [--json]`: a chaos run by hand. Exits 1 on a violation. */
import { parseArgs } from 'node:util';
import { chaos } from './run.js';

const { values } = parseArgs({
  options: {
    seed: { type: 'string', default: String(Date.now() % 1_000_000) },
    moves: { type: 'string', default: '200' },
    forks: { type: 'string', default: '40' },
    json: { type: 'boolean', default: false },
  },
});
const seed = Number(values.seed);
process.stderr.write(`seed ${seed}\n`);
const result = await chaos({
  seed,
  moveCount: Number(values.moves),
  forkCount: Number(values.forks),
  say: (line) => process.stderr.write(`${line}\n`),
});
if (values.json) process.stdout.write(`${JSON.stringify({ seed, ...result }, null, 2)}\n`);
else {
  for (const [outcome, count] of Object.entries(result.outcomes).sort(([a], [b]) => a.localeCompare(b)))
    process.stdout.write(`${String(count).padStart(5)}  ${outcome}\n`);
  process.stdout.write(
    `${result.roundCount} rounds, ${result.endedCount} guests ended as permitted, ` +
      `${result.violations.length} violations\n`,
  );
}
process.exitCode = result.violations.length === 0 ? 0 : 1;

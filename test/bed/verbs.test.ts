import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { type BedRun, buildBed, missingForBed, nativeProgram, runInBed } from './bed.js';

const MINUTE_MS = 60_000;

beforeAll(async () => {
  if (missingForBed().length === 0) await buildBed();
}, 15 * MINUTE_MS);

beforeEach((context) => {
  const missing = missingForBed();
  if (missing.length > 0) context.skip(`needs ${missing.join(', ')}`);
});

/**
 * The guest's /tmp is memory; from there a program is loaded once, not page by page through the shared folder. A test
 * holds both ends of twice as many connections as a session serves.
 */
const SETUP = 'ulimit -n 8192 && cp core_tests /tmp/core_tests && cd /tmp\n';

/** How many tests GoogleTest says have passed in its runs; every one of these ran in the guest. */
const passed = (output: string): number =>
  [...output.matchAll(/\[ {2}PASSED {2}\] (\d+) tests?/g)].reduce((sum, [, count]) => sum + Number(count), 0);

describe('the bed', () => {
  test(
    'has RDMA hosts that reach each other',
    async () => {
      const run = await runInBed(
        `ibv_devinfo | grep -c PORT_ACTIVE
         timeout 100 rping -s -P -a 10.78.0.1 &
         until timeout 20 rping -c -a 10.78.0.1 -I 10.78.0.3 -C 3; do sleep 1; done
         echo reached`,
        { hosts: 3 },
      );
      expect(run.output).toMatch(/^3$/m);
      expect(run.output).toContain('reached');
      expect(run.status, run.output).toBe(0);
    },
    3 * MINUTE_MS,
  );

  test(
    'passes exit statuses on and ends what takes too long',
    async () => {
      const begunAtMs = performance.now();
      expect((await runInBed('exit 7', { hosts: 0 })).status).toBe(7);
      // A busy machine may need long to boot the bed.
      const timeoutSeconds = 5 + Math.ceil((2 * (performance.now() - begunAtMs)) / 1000);
      const late = await runInBed('echo started; sleep 600', { hosts: 0, timeoutSeconds });
      expect(late.status).toBe(124);
      expect(late.output).toContain('started');
    },
    4 * MINUTE_MS,
  );
});

describe('verbs', () => {
  const run = async (script: string, timeoutSeconds: number): Promise<BedRun> =>
    runInBed(SETUP + script, { timeoutSeconds, files: [nativeProgram('core_tests')] });

  test(
    'passes the compliance suite, bare and under faults',
    async () => {
      const result = await run(
        `filter='*/verbs*:Verbs*:-*AgainAndAgain*:*ThatIsKilled*:VerbsCable*'
         ./core_tests --gtest_brief=1 --gtest_filter="$filter" || exit 1
         # Forks, so it wants a process that has not opened a device yet.
         for kind in bare faulty; do
           ./core_tests --gtest_brief=1 --gtest_filter="*ThatIsKilled/verbs_$kind" || exit 1
         done`,
        400,
      );
      expect(result.status, result.output).toBe(0);
      expect(passed(result.output)).toBeGreaterThan(55);
    },
    8 * MINUTE_MS,
  );

  test(
    'leaves nothing behind after hundreds of connections',
    async () => {
      const result = await run("./core_tests --gtest_brief=1 --gtest_filter='*AgainAndAgain*/verbs_bare'", 280);
      expect(result.status, result.output).toBe(0);
      expect(passed(result.output)).toBe(1);
    },
    5 * MINUTE_MS,
  );

  test(
    'loses no byte where packets are lost, and notices a pulled cable',
    async () => {
      const result = await run(
        `for port in p1 p2; do tc qdisc add dev $port root netem loss 2% || exit 1; done
         ./core_tests --gtest_brief=1 --gtest_filter='*RandomRanges*/verbs*' || exit 1
         for port in p1 p2; do tc qdisc del dev $port root || exit 1; done
         ./core_tests --gtest_brief=1 --gtest_filter='VerbsCable*'`,
        280,
      );
      expect(result.status, result.output).toBe(0);
      expect(passed(result.output)).toBeGreaterThan(3);
    },
    5 * MINUTE_MS,
  );
});

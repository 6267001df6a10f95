import { defineConfig } from 'vitest/config';

// Every suite runs in forked processes, because the native addon owns threads and must not share a process with a
// second copy of itself. The end-to-end suite runs two files at a time, as many as the smallest machine has processors:
// most of a file is waiting, and guests rest where a test does not need them busy (vmg.restpct).
export default defineConfig({
  test: {
    pool: 'forks',
    maxWorkers: 2,
    passWithNoTests: true,
    projects: [
      {
        extends: true,
        test: { name: 'tidy', include: ['test/tidy/**/*.test.ts'], testTimeout: 60_000, sequence: { groupOrder: 0 } },
      },
      {
        extends: true,
        test: {
          name: 'unit',
          include: ['test/unit/**/*.test.ts'],
          // A busy machine may need long for what takes milliseconds: no unit test is about time.
          testTimeout: 30_000,
          expect: { poll: { timeout: 10_000 } },
          sequence: { groupOrder: 1 },
        },
      },
      {
        extends: true,
        test: { name: 'sim', include: ['test/sim/**/*.test.ts'], testTimeout: 180_000, sequence: { groupOrder: 2 } },
      },
      {
        extends: true,
        test: {
          name: 'compliance',
          include: ['test/compliance/**/*.test.ts'],
          testTimeout: 30_000,
          fileParallelism: false,
          sequence: { groupOrder: 3 },
        },
      },
      {
        extends: true,
        test: {
          name: 'e2e',
          include: ['test/e2e/**/*.test.ts'],
          // Each wait inside has a limit of its own, and says what it waited for.
          testTimeout: 300_000,
          hookTimeout: 300_000,
          expect: { poll: { timeout: 30_000 } },
          maxWorkers: 2,
          sequence: { groupOrder: 4 },
        },
      },
      {
        // Each known attack, as an attacker would do it.
        extends: true,
        test: {
          name: 'attack',
          include: ['test/attack/**/*.test.ts'],
          testTimeout: 300_000,
          hookTimeout: 300_000,
          expect: { poll: { timeout: 30_000 } },
          maxWorkers: 2,
          sequence: { groupOrder: 5 },
        },
      },
      {
        extends: true,
        test: {
          name: 'bed',
          include: ['test/bed/**/*.test.ts'],
          testTimeout: 300_000,
          fileParallelism: false,
          maxWorkers: 1,
          sequence: { groupOrder: 9 },
        },
      },
    ],
  },
});

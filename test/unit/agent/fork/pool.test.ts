/** What the pool refuses before it makes anything. The sets themselves are tested with real QEMUs (test/e2e). */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { Pool } from '../../../../src/agent/fork/pool.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const stateDir = mkdtempSync(join(tmpdir(), 'vmg-pool-'));
afterEach(() => rmSync(stateDir, { recursive: true, force: true }));

const shape = { parentMode: 'continue', memory: 'cow', network: 'fresh', disks: 'overlay' } as const;

function poolOf(qemuArgs: readonly string[]): Pool {
  const spec = parseSpec({ name: 'web', memory: { size: '16M' }, kernel: '/k', qemuArgs });
  const context = {
    vms: {
      ...{ on: () => undefined, off: () => undefined, all: () => [] },
      has: (name: string) => ['web', 'job-1'].includes(name),
      get: () => ({ spec, state: 'running', accel: 'tcg', memory: {} }),
      backend: new QemuBackend(),
    },
    images: { all: () => [] },
    log: { warn: () => undefined },
  };
  return new Pool(context as never, {
    stateDir,
    config: { processesMax: 8, memoryAvailableBytesMin: 0, memoryStallPercentMax: 100 },
    randomId: () => '0'.repeat(16),
    readMemory: async () => ({ availableBytes: 2 ** 40, stallPercent: 0 }),
  });
}

test('processes that could not have what their VM has of the host are not started', async () => {
  const pool = poolOf(['-vnc', '127.0.0.1:7']);
  await expect(pool.warm({ vm: 'web', cloneCount: 1, namePrefix: null, ...shape })).rejects.toMatchObject({
    code: 'PREFLIGHT_REFUSED',
    message: expect.stringContaining('the VNC display 127.0.0.1:7') as string,
    details: [{ code: 'HOST_RESOURCE' }],
  });
  expect(pool.list()).toEqual([]);
  await pool.close();
});

test('a set is not begun whose names VMs have, also ended ones', async () => {
  const pool = poolOf([]);
  await expect(pool.warm({ vm: 'web', cloneCount: 2, namePrefix: 'job', ...shape })).rejects.toMatchObject({
    code: 'CONFLICT',
    message: expect.stringContaining('job-1') as string,
  });
  expect(pool.list()).toEqual([]);
  await pool.close();
});

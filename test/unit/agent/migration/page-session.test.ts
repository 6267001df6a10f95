import { expect, test } from 'vitest';
import { PageSession } from '../../../../src/agent/migration/page-session.js';

const FULL = { code: 4, errno: 28, what: 'region file system is full' };

/** A page session whose native part reports what the test sets, and the errors that were logged. */
function sessionWithLog() {
  const errors: string[] = [];
  let edge = (): void => undefined;
  const now = { state: 'filling', failure: null as typeof FULL | null, counters: { pagesPresent: 0n } };
  const handle = { snapshot: () => ({ ...now }), connect: async () => undefined, start: () => undefined };
  const native = {
    openTargetSession: (_: unknown, { onEdge }: { onEdge: () => void }) => {
      edge = onEdge;
      return { ...handle, close: async () => undefined };
    },
  };
  const log = { warn: () => undefined, debug: () => undefined, error: (_: object, text: string) => errors.push(text) };
  const vm = { memory: {}, regions: [], spec: { name: 'v', memory: { regions: [] } } };
  const session = new PageSession({ native, vms: {}, log } as never, vm as never, {
    ...{ session: 's', token: 't', bandwidthBytesPerS: 0, isResume: false },
    onComplete: () => undefined,
  });
  const fail = (failure: typeof FULL, pagesPresent: bigint): void => {
    Object.assign(now, { state: 'failed', failure, counters: { pagesPresent } });
    edge();
  };
  return { session, errors, fail };
}

test('a failure that each try meets again is logged once, and again after progress or for another reason', async () => {
  const { session, errors, fail } = sessionWithLog();
  for (let tries = 0; tries < 100; tries++) fail(FULL, 7n);
  expect(errors).toHaveLength(1);
  fail(FULL, 8n);
  expect(errors).toHaveLength(2);
  fail({ ...FULL, errno: 122 }, 8n);
  expect(errors).toHaveLength(3);
  await session.close();
});

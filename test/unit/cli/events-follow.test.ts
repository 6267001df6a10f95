/** `vmctl events --follow` while the daemon comes and goes. */
import { expect, test } from 'vitest';
import { type ApiClient, DaemonUnreachable } from '../../../src/api/client.js';
import { follow } from '../../../src/cli/vmctl-events.js';

const LIMITS = { everyMs: 5, forMs: 100 };

/** An API that does these things, one after the other, and is then away for good. Returns how often it was asked. */
function apiThat(...turns: (() => Promise<boolean>)[]): { api: Pick<ApiClient, 'followVms'>; asked: () => number } {
  let count = 0;
  const followVms: ApiClient['followVms'] = async (_, __, options) => {
    const isOpen = await turns[count++]?.();
    if (isOpen !== true) throw new DaemonUnreachable('no daemon answers', undefined);
    options?.onOpen?.();
  };
  return { api: { followVms }, asked: () => count };
}

const away = async (): Promise<boolean> => false;
/** The stream ends without an event. */
const quiet = async (): Promise<boolean> => true;
const quietAfter = (waitMs: number) => async (): Promise<boolean> => {
  await new Promise((resolve) => setTimeout(resolve, waitMs));
  return true;
};

test('a break is forgotten when the daemon answers again, although nothing has happened to its VMs', async () => {
  const { api, asked } = apiThat(quiet, away, quietAfter(2 * LIMITS.forMs), away, quiet);
  await expect(follow(api, undefined, false, LIMITS)).rejects.toBeInstanceOf(DaemonUnreachable);
  expect(asked()).toBeGreaterThan(5);
});

test('a daemon that does not come back is given up', async () => {
  const beganAtMs = performance.now();
  await expect(follow(apiThat(quiet).api, undefined, false, LIMITS)).rejects.toBeInstanceOf(DaemonUnreachable);
  expect(performance.now() - beganAtMs).toBeGreaterThan(LIMITS.forMs);
});

/**
 * Failures that a test requests by the name of a point, as in
 * VMIGRATE_FAULT="before:commit=crash;after:stopSource=fail;before:drain=park:/tmp/x". Only a daemon started with
 * --test-faults reads the variable. In any other daemon every point is a call that does nothing.
 *
 *   crash       the daemon is killed at once, as by kill -9
 *   fail        the step fails there
 *   park:FILE   waits while FILE exists; the daemon creates FILE.parked when it waits
 *   delay:MS    waits
 */
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { MigrationError } from '../domain/errors.js';
import type { InjectPort } from '../engine/ports/inject.js';

const PARK_POLL_MS = 20;
const DELAY_MS_MAX = 600_000;

type Action =
  | { readonly kind: 'crash' }
  | { readonly kind: 'fail' }
  | { readonly kind: 'park'; readonly file: string }
  | { readonly kind: 'delay'; readonly ms: number };

export const NOTHING_INJECTED: InjectPort = { hit: () => Promise.resolve() };

/** Throws USAGE for any text that would silently do nothing. */
export function parseInjections(text: string): InjectPort {
  const actions = new Map<string, Action>();
  for (const part of text.split(';')) {
    if (part.trim() === '') continue;
    const [, point, what] = /^\s*([^=\s]+)=(.+?)\s*$/.exec(part) ?? [];
    if (point === undefined || what === undefined)
      throw new MigrationError('USAGE', `VMIGRATE_FAULT: "${part}" is not POINT=ACTION`);
    actions.set(point, parseAction(what));
  }
  return {
    async hit(point) {
      const action = actions.get(point);
      if (action !== undefined) await act(point, action);
    },
  };
}

function parseAction(text: string): Action {
  if (text === 'crash' || text === 'fail') return { kind: text };
  if (text.startsWith('park:/')) return { kind: 'park', file: text.slice('park:'.length) };
  const ms = /^delay:(\d{1,6})$/.exec(text)?.[1];
  if (ms !== undefined && Number(ms) <= DELAY_MS_MAX) return { kind: 'delay', ms: Number(ms) };
  throw new MigrationError('USAGE', `VMIGRATE_FAULT: "${text}" is none of crash, fail, park:/FILE, delay:MS`);
}

async function act(point: string, action: Action): Promise<void> {
  switch (action.kind) {
    case 'crash':
      process.kill(process.pid, 'SIGKILL');
      // The promise never resolves, so the step does not continue before the signal ends this process.
      return new Promise(() => undefined);
    case 'fail':
      throw new MigrationError('STEP_FAILED', `a test requested a failure at ${point}`);
    case 'park':
      if (!existsSync(action.file)) return;
      await writeFile(`${action.file}.parked`, point);
      while (existsSync(action.file)) await sleep(PARK_POLL_MS);
      return;
    case 'delay':
      await sleep(action.ms);
  }
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

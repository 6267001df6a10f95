/**
 * The calls between hosts that daemons of build 0.1.0 have made and answered during a move. This build accepts them as
 * they are, and sends that build no key that it does not know: its schemas refuse such a key.
 */
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import { HOST_CALLS } from '../../../src/api/peers/methods.js';
import { MigrationError } from '../../../src/domain/errors.js';
import { parseKept } from '../../../src/kit/unknown-keys.js';
import { rest, Scripted } from '../engine/scripted.js';
import { host, request } from '../planner/planner-facts.js';

interface KeptCall {
  readonly call: string;
  readonly body: unknown;
  readonly result: unknown;
}

const FILE = fileURLToPath(new URL('../../fixtures/calls-0.1.0/calls.jsonl', import.meta.url));
const kept = (await readFile(FILE, 'utf8'))
  .split('\n')
  .filter((line) => line !== '')
  .map((line) => JSON.parse(line) as KeptCall);

/** The calls that a move makes to its target, which may be of the other build. */
const TO_TARGET = ['inventory', 'checkTarget', 'prepare', 'connect', 'awaitLoaded', 'resume', 'progress', 'finish'];

test('all calls to a target are kept', () => {
  expect([...new Set(kept.map(({ call }) => call))].sort()).toEqual([...TO_TARGET].sort());
});

describe.each(kept)('$call', ({ call, body, result }) => {
  const line = HOST_CALLS.find(({ name }) => name === call);
  if (line === undefined) throw new Error(`no call ${call}`);

  test('is accepted with its answer, unchanged', () => {
    expect(JSON.parse(JSON.stringify(parseKept(line.args as never, body)))).toEqual(body);
    expect(JSON.parse(JSON.stringify(parseKept(line.result as never, result) ?? null))).toEqual(result);
  });

  test('is accepted with keys of a newer version, which are kept', () => {
    const newer = withKeys(body);
    expect(parseKept(line.args as never, newer)).toEqual(newer);
  });
});

test('this build sends no key that build 0.1.0 does not know', async () => {
  const world = new Scripted();
  const { dataSecurity: _, ...older } = host('B');
  world.on['B.inventory'] = () => older;
  const sent = new Map<string, unknown>();
  for (const call of ['prepare', 'connect', 'resume'])
    for (const { body, result } of kept.filter((line) => line.call === call))
      world.on[`B.${call}`] = (...args: unknown[]) => {
        expect(body).toHaveLength(args.length);
        refuseUnknown(body, args);
        sent.set(call, args);
        return result ?? undefined;
      };
  const { jobs } = await world.daemon();
  expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
  for (const [call, args] of sent) {
    const known = keysOf(kept.find((line) => line.call === call)?.body);
    // Optional parts of a spec that the recorded VM does not have.
    const optional = ['disks', 'nics', 'devices', 'qemuArgs', 'regions', 'keys'];
    const unknown = [...keysOf(args)].filter((key) => !known.has(key) && !optional.some((part) => key.includes(part)));
    expect({ call, unknown }).toEqual({ call, unknown: [] });
  }
  expect([...sent.keys()]).toEqual(['prepare', 'connect', 'resume']);
});

/** Build 0.1.0 refuses a key that it does not know. */
function refuseUnknown(body: unknown, args: unknown): void {
  if (!keysOf(args).has('.*.incarnation') || keysOf(body).has('.*.incarnation')) return;
  throw new MigrationError('USAGE', 'body.0.incarnation: unknown key');
}

/** Returns the paths of all keys of a value, with `*` for the items of a list. */
function keysOf(value: unknown, path = ''): Set<string> {
  if (typeof value !== 'object' || value === null) return new Set();
  const inner = Object.entries(value).flatMap(([key, member]) => {
    const here = `${path}.${Array.isArray(value) ? '*' : key}`;
    return [here, ...keysOf(member, here)];
  });
  return new Set(inner);
}

/** Adds a key to every object in the value. */
function withKeys(value: unknown): unknown {
  if (typeof value !== 'object' || value === null) return value;
  if (Array.isArray(value)) return value.map(withKeys);
  return {
    ...Object.fromEntries(Object.entries(value).map(([key, member]) => [key, withKeys(member)])),
    ofNewerVersion: { or: 'so' },
  };
}

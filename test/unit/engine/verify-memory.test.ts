import { describe, expect, test } from 'vitest';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import type { MigrationJobView } from '../../../src/domain/job.js';
import { CHUNK_BYTES, CHUNKS_PER_CALL_MAX, DIGEST_BYTES } from '../../../src/domain/verification.js';
import type { ChunkRange } from '../../../src/engine/ports/session.js';
import { CONSTANTS } from '../../../src/protocol/wire.js';
import { host, request, vm } from '../planner/planner-facts.js';
import { rest, Scripted } from './scripted.js';

const verified = { ...request, verifyMemory: true } as const;
/** The region of the VM of these tests: 512 MiB in chunks of 2 MiB. */
const CHUNKS = 256;

function digests({ first, count }: ChunkRange, wrong: readonly number[] = []): string {
  const of = (chunk: number) => Buffer.alloc(DIGEST_BYTES, `${wrong.includes(chunk) ? 'other' : 'chunk'} ${chunk},`);
  return Buffer.concat(Array.from({ length: count }, (_, index) => of(first + index))).toString('base64');
}

/** `arrived` answers for the target; `null`: it has lost what had arrived. */
function world(wrong: readonly number[] = [], isLost = false) {
  const scripted = new Scripted();
  const asked: { source: unknown[]; target: unknown[]; condemned: unknown[] } = {
    source: [],
    target: [],
    condemned: [],
  };
  for (const name of ['A', 'B']) scripted.on[`${name}.inventory`] = () => ({ ...host(name), canVerifyMemory: true });
  scripted.on['A.vmInventory'] = () => ({ ...vm, owner: 'A' });
  scripted.on['A.digestFrozen'] = (_session: string, key: string, range: ChunkRange) => {
    asked.source.push([key, range]);
    return { digests: digests(range) };
  };
  scripted.on['B.digestArrived'] = (_session: string, range: ChunkRange) => {
    asked.target.push(range);
    return isLost ? { digests: null, reason: 'the tags are gone' } : { digests: digests(range, wrong) };
  };
  scripted.on['B.condemn'] = (_session: string, damage: string) => {
    asked.condemned.push(damage);
    return null;
  };
  return { scripted, asked };
}

async function run(scripted: Scripted): Promise<MigrationJobView> {
  const { jobs } = await scripted.daemon();
  return (await rest(jobs, (await jobs.submit(verified)).id)) as MigrationJobView;
}

test('the constants are those of the native code', () => {
  const { MEMORY_CHUNK_BYTES, MEMORY_CHUNKS_MAX, PAGE_TAG_BYTES } = CONSTANTS;
  expect([CHUNK_BYTES, CHUNKS_PER_CALL_MAX, DIGEST_BYTES]).toEqual([
    MEMORY_CHUNK_BYTES,
    MEMORY_CHUNKS_MAX,
    PAGE_TAG_BYTES,
  ]);
});

describe('a move that is verified', () => {
  test('compares each chunk once, under a key of its two hosts, before the source is released', async () => {
    const { scripted, asked } = world();
    const prepared: { memoryKey?: string; token?: string }[] = [];
    scripted.on['B.prepare'] = (given: { memoryKey?: string; token?: string }) => {
      prepared.push(given);
      return { nativeUri: null };
    };
    const { state, report } = await run(scripted);
    expect(state).toBe('done');
    expect(report?.verified).toMatchObject({ isComplete: true, chunks: CHUNKS, pages: 131_072 });
    const ranges = [0, 64, 128, 192].map((first) => ({ region: 0, first, count: 64 }));
    expect(asked.target).toEqual(ranges);
    const key = prepared[0]?.memoryKey;
    expect(key).toMatch(/^[0-9a-f]{64}$/);
    expect(key).not.toBe(prepared[0]?.token);
    expect(asked.source).toEqual(ranges.map((range) => [key, range]));
    expect(scripted.calls.lastIndexOf('B.digestArrived')).toBeLessThan(scripted.calls.indexOf('A.release'));
    expect(asked.condemned).toEqual([]);
  });

  test('is not one without the wish', async () => {
    const { scripted, asked } = world();
    const { jobs } = await scripted.daemon();
    const { report } = (await rest(jobs, (await jobs.submit(request)).id)) as MigrationJobView;
    expect(report).not.toHaveProperty('verified');
    expect(asked).toEqual({ source: [], target: [], condemned: [] });
  });

  test('stops the VM once at the first difference, names all of them, and keeps the source', async () => {
    const { scripted, asked } = world([70, 255]);
    const { state, error } = await run(scripted);
    expect(state).toBe('lost');
    const chunk = (index: number) => ({ region: 'ram0', offsetBytes: index * CHUNK_BYTES, lengthBytes: CHUNK_BYTES });
    expect(error).toMatchObject({
      code: 'DAMAGED',
      details: { differentCount: 2, chunks: [chunk(70), chunk(255)] },
    });
    expect(asked.condemned).toEqual([`memory that came from A is not what it was there (ram0 at ${70 * CHUNK_BYTES})`]);
    expect(scripted.calls).not.toContain('A.release');
    expect(scripted.calls).not.toContain('A.continueVm');
  });

  test('stops the VM although the first call to do so is lost', async () => {
    const { scripted, asked } = world([3]);
    const told = scripted.on['B.condemn'] as (...given: unknown[]) => unknown;
    let calls = 0;
    scripted.on['B.condemn'] = (...given: never[]) => {
      if (++calls === 1) throw new MigrationError('UNREACHABLE', 'as told');
      return told(...given);
    };
    const { state, error } = await run(scripted);
    expect(state).toBe('lost');
    expect(asked.condemned).toHaveLength(1);
    expect(error).toMatchObject({ code: 'DAMAGED', details: { differentCount: 1 } });
  });

  test('goes on where it was after a loss of the connection', async () => {
    const { scripted, asked } = world();
    const told = scripted.on['B.digestArrived'] as (...given: unknown[]) => unknown;
    let calls = 0;
    scripted.on['B.digestArrived'] = (...given: never[]) => {
      if (++calls === 3) throw new MigrationError('UNREACHABLE', 'as told');
      return told(...given);
    };
    const { state, report } = await run(scripted);
    expect(state).toBe('done');
    expect(asked.target).toHaveLength(4);
    expect(report?.verified).toMatchObject({ isComplete: true, chunks: CHUNKS });
  });

  test('never says that it is verified if the target has lost what had arrived', async () => {
    const { scripted } = world([], true);
    const { state, report } = await run(scripted);
    expect(state).toBe('done');
    expect(report?.verified).toMatchObject({ isComplete: false, chunks: 0, reason: 'the tags are gone' });
  });

  test.each<[ErrorCode]>([['NOT_FOUND'], ['OWNER_CHANGED']])(
    'nor if the source has nothing of it any more: %s',
    async (code) => {
      const { scripted } = world();
      let exposed = 0;
      scripted.on['A.expose'] = () => {
        if (++exposed > 1) throw new MigrationError(code, 'as told');
        return { transport: 'tcp', host: '10.0.0.1', port: 1, keys: [] };
      };
      const { state, report } = await run(scripted);
      expect(state).toBe('done');
      expect(report?.verified).toMatchObject({ isComplete: false, reason: expect.stringMatching(/A does not have/) });
    },
  );

  test('takes no digests of another length for the right ones', async () => {
    const { scripted, asked } = world();
    let calls = 0;
    const told = scripted.on['B.digestArrived'] as (...given: unknown[]) => unknown;
    scripted.on['B.digestArrived'] = (...given: never[]) => (++calls <= 3 ? { digests: '' } : told(...given));
    const { jobs } = await scripted.daemon();
    const { id } = await jobs.submit(verified);
    const view = await rest(jobs, id);
    expect(view).toMatchObject({ state: 'needsRecovery', error: { cause: { code: 'PEER_PROTOCOL' } } });
    expect(asked.condemned).toEqual([]);
  });
});

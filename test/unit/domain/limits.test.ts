/** The limits of a process and a host: which failure names which, and what is said to a person. */
import { constants } from 'node:os';
import { describe, expect, test } from 'vitest';
import { toMigrationError } from '../../../src/domain/errors.js';
import { LIMITS, type Limit, limitInText, limitMet } from '../../../src/domain/limits.js';
import { failureToError } from '../../../src/native/failure.js';
import { NATIVE_ERROR } from '../../../src/protocol/wire.js';

const systemError = (code: string, syscall: string) =>
  Object.assign(new Error(`${syscall}: ${code}`), { code, syscall, errno: -1 });

const CASES: readonly [errno: string, call: string, limit: Limit | null][] = [
  ['EMFILE', 'open', 'openFiles'],
  ['EMFILE', 'take the descriptors of QEMU', 'openFiles'],
  ['EMFILE', 'inotify_init', 'watches'],
  ['EMFILE', 'watch', 'watches'],
  ['ENFILE', 'open', 'openFilesOfHost'],
  ['EAGAIN', 'spawn qemu-system-x86_64', 'tasks'],
  ['EAGAIN', 'pthread_create', 'tasks'],
  ['EAGAIN', 'read', null],
  ['ENOMEM', 'mmap', 'memory'],
  ['ENOMEM', 'ibv_reg_mr', 'lockedMemory'],
  ['ENOSPC', 'write', 'space'],
  ['ENOSPC', 'watch', 'watches'],
  ['EDQUOT', 'write', 'space'],
  ['ENOENT', 'open', null],
];

describe('a limit', () => {
  test.each(CASES)('%s of %s', (errno, call, limit) => {
    expect(limitMet(errno, call)).toBe(limit);
  });

  test('that Node meets is named, with the place where it is raised', () => {
    for (const [errno, call, limit] of CASES) {
      const error = toMigrationError(systemError(errno, call));
      if (limit === null) {
        expect(error.code).toBe('INTERNAL');
        continue;
      }
      expect(error).toMatchObject({ code: LIMITS[limit].code, remedy: LIMITS[limit].remedy, details: { limit } });
      expect(error.message).toContain(LIMITS[limit].text);
      expect(error.message).toContain(errno);
    }
  });

  test('that the native code meets is named too, and not "message from the preload"', () => {
    const failure = { code: NATIVE_ERROR.SYSTEM, errno: constants.errno.EMFILE, what: 'take the descriptors of QEMU' };
    const error = failureToError(failure, 'the preload of vm1');
    expect(error).toMatchObject({ code: 'OUT_OF_MEMORY', details: { limit: 'openFiles' } });
    expect(error.message).toMatch(/EMFILE.*RLIMIT_NOFILE/);
    expect(error.remedy).toMatch(/LimitNOFILE=.*ulimit -n.*fs\.nr_open/);
    const locked = { code: NATIVE_ERROR.OUT_OF_MEMORY, errno: constants.errno.ENOMEM, what: 'ibv_reg_mr' };
    expect(failureToError(locked, 'expose').remedy).toMatch(/LimitMEMLOCK=infinity/);
    const mapped = { code: NATIVE_ERROR.OUT_OF_MEMORY, errno: constants.errno.ENOMEM, what: 'mmap region' };
    expect(failureToError(mapped, 'open').remedy).toMatch(/vm\.max_map_count/);
  });

  test('is found in the words of other programs', () => {
    expect(limitInText('qemu-system-x86_64: Failed to open: Too many open files')).toBe('openFiles');
    expect(limitInText('Too many open files in system')).toBe('openFilesOfHost');
    expect(limitInText('qemu_thread_create: Resource temporarily unavailable')).toBe('tasks');
    expect(limitInText('cannot set up guest memory: Cannot allocate memory')).toBe('memory');
    expect(limitInText('Could not write: No space left on device')).toBe('space');
    expect(limitInText('Resource temporarily unavailable')).toBeNull();
    expect(limitInText('no machine of that name')).toBeNull();
  });
});

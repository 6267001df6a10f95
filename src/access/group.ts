/** The groups of this system. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { MigrationError } from '../domain/errors.js';

const run = promisify(execFile);
const ANSWER_MS = 10_000;

/** Returns the id of a group, which is named by its name or its number. Throws SPEC_INVALID if there is none. */
export async function groupId(group: string): Promise<number> {
  if (/^\d{1,9}$/.test(group)) return Number(group);
  // getent also asks the directory services of a cluster.
  const { stdout } = await run('getent', ['group', '--', group], { timeout: ANSWER_MS }).catch((cause: unknown) => {
    throw new MigrationError('SPEC_INVALID', `this system has no group ${group}`, {
      remedy: `make it (groupadd --system ${group}), or name another one under security.socketGroup`,
      cause,
    });
  });
  return Number(stdout.split(':')[2]);
}

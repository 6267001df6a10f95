/** `vfork --rm`: removes the clones of a fork, and the copies of its image, on all hosts. */
import type { ApiClient } from '../api/client.js';
import { MigrationError } from '../domain/errors.js';
import type { ForkReport } from '../domain/fork.js';
import type { RemovedOnHosts, StoppedOnHosts, Unanswered } from '../schemas/all-hosts.js';

/**
 * Ends clones that run on after their word, and removes all clones and the image. Clones of another fork keep it.
 * `isImageKept`: the image was there before the fork. Returns what was removed of the image. Throws an error if
 * something stays on a host of the fork, also because the host does not answer.
 */
export async function removeFork(
  api: ApiClient,
  { clones, failures, image, bytes }: Pick<ForkReport, 'clones' | 'failures' | 'image' | 'bytes'>,
  isImageKept: boolean,
): Promise<RemovedOnHosts> {
  const withClones = [...clones, ...failures].flatMap(({ host }) => (host === undefined ? [] : [host]));
  const ofFork = new Set([...withClones, ...Object.keys(bytes.perHost)]);
  const vms = clones.map(({ name, uuid }) => ({ name, uuid }));
  const stopped = await api.post<StoppedOnHosts>('/v1/clones/stop', { clones: vms, force: true });
  refuseSilent(stopped.unanswered, ofFork, 'clones');
  const [failed] = stopped.failures;
  if (failed !== undefined) throw stays(`clone ${failed.name} stays on ${failed.host}`, failed.error, failed.host);
  if (isImageKept) return { removals: [], failures: [], unanswered: [] };
  const removed = await api.delete<RemovedOnHosts>(`/v1/images/${image}`, { allHosts: true });
  refuseSilent(removed.unanswered, ofFork, `image ${image}`);
  const [kept] = removed.failures;
  if (kept !== undefined) throw stays(`image ${image} stays on ${kept.host}`, kept.error, kept.host);
  return { ...removed, unanswered: [] };
}

/** A silent host that has no part in the fork has nothing of it. */
function refuseSilent(unanswered: Unanswered, ofFork: ReadonlySet<string>, what: string): void {
  for (const { host, error } of unanswered)
    if (ofFork.has(host)) throw stays(`${what} of the fork may stay on ${host}`, error, host);
}

function stays(message: string, error: unknown, host: string): MigrationError {
  const cause = MigrationError.fromJSON(error, host);
  return new MigrationError(cause.code, message, { cause });
}

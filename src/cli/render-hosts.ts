/** Formats what all hosts have answered: images, VMs, ended clones, and who has not answered. */
import type { ImagesOnHosts, RemovedOnHosts, StoppedOnHosts, Unanswered, VmsOnHosts } from '../schemas/all-hosts.js';
import type { HostCloneEnd } from './await-clones.js';
import { levelLines } from './error-text.js';
import { bytes, plain, table, vmTable } from './render.js';
import { removalText } from './render-fork.js';

export function imagesOnHostsText({ images, unanswered }: ImagesOnHosts): string {
  const madeAt = new Map<string, string>();
  for (const { id, createdAt } of images) {
    const known = madeAt.get(id);
    if (known === undefined || createdAt < known) madeAt.set(id, createdAt);
  }
  const keyOf = ({ id, host }: ImagesOnHosts['images'][number]): string => `${madeAt.get(id)} ${id} ${host}`;
  const sorted = [...images].sort((a, b) => (keyOf(a) < keyOf(b) ? -1 : 1));
  const rows = sorted.map((image) => [
    image.id,
    image.host,
    image.state,
    pagesText(image.pagesDone, image.pagesTotal),
    bytes(image.memoryBytes),
    bytes(image.allocatedBytes),
    String(image.clones.length),
    image.parent,
  ]);
  const head = ['IMAGE', 'HOST', 'STATE', 'PAGES', 'MEMORY', 'TAKES', 'CLONES', 'PARENT'];
  const problems = sorted.flatMap(({ id, host, problem }) =>
    problem === undefined ? [] : [`${plain(`${id} on ${host}: ${problem}`)}\n`],
  );
  return `${table(head, rows)}${problems.join('')}${unansweredText(unanswered)}`;
}

function pagesText(done: number, total: number): string {
  if (total === 0) return '-';
  return done >= total ? `${total}` : `${done}/${total} ${Math.floor((100 * done) / total)} %`;
}

export function vmsOnHostsText({ vms, unanswered }: VmsOnHosts): string {
  return `${vmTable(vms)}${unansweredText(unanswered)}`;
}

export function unansweredText(unanswered: Unanswered): string {
  return unanswered.map(({ host, error }) => `${plain(`no answer from ${host}: ${whyText(error)}`)}\n`).join('');
}

export function stoppedText({ stopped, failures, unanswered }: StoppedOnHosts): string {
  const kept = failures.map(
    ({ name, host, error }) => `  ${plain(`${name} still runs on ${host}: ${whyText(error)}`)}\n`,
  );
  const head = `stopped ${stopped.length} ${stopped.length === 1 ? 'clone' : 'clones'}\n`;
  return `${head}${kept.join('')}${unansweredText(unanswered)}`;
}

export function removedText({ removals, failures, unanswered }: RemovedOnHosts): string {
  const kept = failures.map(({ host, error }) => `${plain(`not removed on ${host}: ${whyText(error)}`)}\n`);
  return [...removals.map(({ host, removal }) => `${plain(host)}: ${removalText(removal)}`), ...kept]
    .join('')
    .concat(unansweredText(unanswered));
}

/** How each clone ended, for `vfork --wait`. */
export function endsText(ends: readonly HostCloneEnd[]): string {
  return table(
    ['NAME', 'HOST', 'EXIT', 'ENDED BY', 'LOG'],
    ends.map(({ name, host, exitCode, reason, log }) => [
      ...[name, host, exitCode === null ? '-' : String(exitCode)],
      ...[reason, log ?? '-'],
    ]),
  );
}

/** True if a host that may have something to say has not said it. One of an earlier build has no part in forks. */
export function isAnySilent(unanswered: Unanswered): boolean {
  return unanswered.some(({ error }) => error.code !== 'UNSUPPORTED');
}

function whyText(error: Unanswered[number]['error']): string {
  return levelLines(error).join(': ');
}

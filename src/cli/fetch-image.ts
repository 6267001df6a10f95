/** `vmctl image fetch`: has a host read all of an image, and waits until it has. */
import type { ApiClient } from '../api/client.js';
import { NETWORK_CODES, toMigrationError } from '../domain/errors.js';
import type { ImageView } from '../domain/image.js';
import { bytes } from './render.js';
import { type Output, ProgressLine } from './terminal.js';

const POLL_MS = 500;
/** How long the daemon, or the host that reads, may be unreachable. Neither forgets what it has been asked for. */
const AWAY_MS_MAX = 60_000;

/** `host`: undefined is the host of the daemon. */
export async function fetchImage(
  api: ApiClient,
  { image, host }: { readonly image: string; readonly host: string | undefined },
  { isDetached, output }: { readonly isDetached: boolean; readonly output: Output },
): Promise<ImageView> {
  const progress = new ProgressLine(output);
  const body = host === undefined ? {} : { host };
  let awayAtMs: number | null = null;
  try {
    for (;;) {
      try {
        // Repeated, it only says how far the host is.
        const view = await api.post<ImageView>(`/v1/images/${encodeURIComponent(image)}/fetch`, body);
        awayAtMs = null;
        if (isDetached || view.state === 'complete') return view;
        progress.text(progressText(view));
      } catch (error) {
        if (isDetached || !NETWORK_CODES.has(toMigrationError(error).code)) throw error;
        awayAtMs ??= performance.now();
        if (performance.now() - awayAtMs > AWAY_MS_MAX) throw error;
      }
      await new Promise((wake) => setTimeout(wake, POLL_MS));
    }
  } finally {
    progress.clear();
  }
}

function progressText({ id, host, pagesDone, pagesTotal, pageBytes, problem }: ImageView): string {
  const waits = problem === undefined ? '' : `; it waits: ${problem}`;
  const part = pagesTotal === 0 ? '' : `, ${Math.floor((100 * pagesDone) / pagesTotal)} %`;
  return `image ${id} on ${host}: ${bytes(pagesDone * pageBytes)} of ${bytes(pagesTotal * pageBytes)}${part}${waits}`;
}

/**
 * The other hosts, as the last daemon of a state directory was configured. The daemon itself never reads this: it is
 * for `vmctl state repair`, which asks them while no daemon runs.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { writeDurably } from '../durable/durable-file.js';
import { unreadable } from '../durable/record-files.js';
import { checkVersion, seal, unseal } from '../durable/sealed.js';
import { HOSTS_FILE } from '../durable/state-format.js';
import { parseKept } from '../kit/unknown-keys.js';
import { hostName } from '../schemas/words.js';

const VERSION = 1;

const schema = z.strictObject({
  version: z.literal(VERSION),
  /** The name of this host. */
  name: hostName,
  /** Name → URL of the https API. */
  peers: z.record(hostName, z.string().max(1024)),
  /** The folder with this host's certificate; null: it has none. */
  tls: z.string().max(4096).nullable(),
});
export type KnownHosts = Omit<z.infer<typeof schema>, 'version'>;

/** Writes the file if it would change. Durable when it resolves. */
export async function keepKnownHosts(directory: string, hosts: KnownHosts): Promise<void> {
  const path = join(directory, HOSTS_FILE);
  const text = seal({ version: VERSION, ...hosts });
  if ((await readFile(path, 'utf8').catch(() => '')) !== text) await writeDurably(path, text);
}

/** Returns null if no daemon of this build has used the directory. Throws CORRUPT, or UNSUPPORTED. */
export async function readKnownHosts(directory: string): Promise<KnownHosts | null> {
  const path = join(directory, HOSTS_FILE);
  const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return null;
    throw error;
  });
  if (text === null) return null;
  try {
    const json = unseal(text, path);
    checkVersion(json, VERSION, path);
    return parseKept(schema, json);
  } catch (error) {
    throw unreadable(`${path} is not a list of hosts`, error);
  }
}

/**
 * Questions and orders to this host and its peers, at once, each with a deadline of its own. Who does not answer is
 * named in the result.
 */
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import type { VmIdentity } from '../../domain/host.js';
import type { ImageRemoval } from '../../domain/image.js';
import { inTime } from '../../kit/in-time.js';
import type {
  ClonesOnHosts,
  ImagesOnHosts,
  RemovedOnHosts,
  StoppedOnHosts,
  Unanswered,
  VmsOnHosts,
} from '../../schemas/all-hosts.js';
import type { ApiServices } from '../contract/ports.js';

type Services = Pick<ApiServices, 'host' | 'agent' | 'peers'>;
/** The role of a host in this file; ports.ts has the type of all roles. */
type Host = ReturnType<ApiServices['peers']['agent']>;
type Outcome<T> = { readonly host: string } & ({ readonly value: T } | { readonly error: MigrationError });

const ANSWER_MS_MAX = 5_000;
/** For an order that ends many VMs, or merges disks. */
const ORDER_MS_MAX = 600_000;

/** How a host of an earlier build answers a question that it does not know. */
const UNKNOWN_CALL_CODES: ReadonlySet<ErrorCode> = new Set(['NOT_FOUND', 'USAGE', 'UNSUPPORTED']);

export async function imagesOnHosts(services: Services, image: string | null): Promise<ImagesOnHosts> {
  const { values, unanswered } = await ask(services, allHosts(services), ({ images }) => images.imageViews(image));
  return { images: values.flatMap(({ value }) => [...value.images]), unanswered };
}

export async function vmsOnHosts(services: Services): Promise<VmsOnHosts> {
  const { values, unanswered } = await ask(services, allHosts(services), ({ inventory }) => inventory.vmViews());
  return { vms: values.flatMap(({ value }) => [...value.vms]), unanswered };
}

/** The clones that run, or have run and are still listed, on an image. Throws NOT_FOUND if nobody has the image. */
export async function clonesOnHosts(services: Services, image: string): Promise<ClonesOnHosts> {
  const { values, unanswered } = await askForClones(services, allHosts(services), image);
  return { clones: values.flatMap(({ value }) => value), unanswered };
}

/** Throws NOT_FOUND if none of the hosts has the image or a clone of it. */
export async function stopImage(
  services: Services,
  image: string,
  { isForced, isEverywhere }: { isForced: boolean; isEverywhere: boolean },
): Promise<StoppedOnHosts> {
  const hosts = isEverywhere ? allHosts(services) : [services.host];
  const { values, unanswered } = await askForClones(services, hosts, image);
  const clonesOf = new Map(values.flatMap(({ host, value }) => (value.length > 0 ? [[host, value] as const] : [])));
  const stopped = await stop(services, clonesOf, isForced);
  return { ...stopped, unanswered: [...unanswered, ...stopped.unanswered] };
}

/** Ends the VMs wherever they are. One that nobody has is not in the result. */
export async function stopClones(
  services: Services,
  clones: readonly VmIdentity[],
  isForced: boolean,
): Promise<StoppedOnHosts> {
  const { values, unanswered } = await ask(services, allHosts(services), ({ inventory }) => inventory.vmViews());
  const asked = new Map(clones.map(({ name, uuid }) => [name, uuid]));
  const found = values.map(({ host, value }) => {
    return [host, value.vms.filter(({ name, uuid }) => asked.get(name) === uuid)] as const;
  });
  const clonesOf = new Map(found.filter(([, vms]) => vms.length > 0));
  const stopped = await stop(services, clonesOf, isForced);
  return { ...stopped, unanswered: [...unanswered, ...stopped.unanswered] };
}

/**
 * Removes an image on all hosts that have it. One that others read is removed after them, so a refusal is tried again
 * as long as others go. Throws NOT_FOUND if nobody has the image.
 */
export async function removeImage(
  services: Services,
  image: string,
  options: { isForced: boolean; isDroppingSaved: boolean },
): Promise<RemovedOnHosts> {
  const { values, unanswered } = await ask(services, allHosts(services), ({ images }) => images.imageViews(image));
  const removals = new Map<string, ImageRemoval>();
  let left = values.flatMap(({ host, value }) => (value.images.length > 0 ? [host] : []));
  if (left.length === 0) throw notFound(image, unanswered);
  let failures: RemovedOnHosts['failures'] = [];
  for (let isAdvancing = true; isAdvancing && left.length > 0; ) {
    const outcomes = await callAll(services, left, ORDER_MS_MAX, (host) => host.images.removeImage(image, options));
    const done = outcomes.flatMap((outcome) => ('value' in outcome ? [outcome] : []));
    for (const { host, value } of done) removals.set(host, added(removals.get(host), value));
    const refused = outcomes.flatMap((outcome) => ('error' in outcome ? [outcome] : []));
    failures = [
      ...failures.filter(({ host }) => !left.includes(host)),
      ...refused.map(({ host, error }) => ({ host, error: error.toJSON() })),
    ];
    // A host keeps the disks that another one still reads.
    const keeping = done.filter(({ value }) => value.keptLayers.length > 0);
    left = [
      ...refused.flatMap(({ host, error }) => (error.code === 'CONFLICT' ? [host] : [])),
      ...keeping.map(({ host }) => host),
    ];
    isAdvancing = done.length > keeping.length;
  }
  return { removals: [...removals].map(([host, removal]) => ({ host, removal })), failures, unanswered };
}

function added(before: ImageRemoval | undefined, removal: ImageRemoval): ImageRemoval {
  if (before === undefined) return removal;
  return { ...removal, freedBytes: before.freedBytes + removal.freedBytes };
}

/** Has a host read the rest of an image, and says how much of it is there. */
export async function fetchImage({ host: self, agent, peers }: Services, image: string, host: string) {
  const port = host === self ? agent : peers.agent(host);
  await port.forks.completeImage(image);
  const [view] = (await port.images.imageViews(image)).images;
  if (view === undefined) throw new MigrationError('NOT_FOUND', `no image ${image} on ${host}`);
  return view;
}

function allHosts({ host, peers }: Services): string[] {
  return [host, ...peers.names];
}

async function askForClones(services: Services, hosts: readonly string[], image: string) {
  const { values, unanswered } = await ask(services, hosts, async ({ images }) => {
    const [{ images: views }, { clones }] = await Promise.all([images.imageViews(image), images.imageClones(image)]);
    return { isKnown: views.length + clones.length > 0, clones: [...clones] };
  });
  if (!values.some(({ value }) => value.isKnown)) throw notFound(image, unanswered);
  return { values: values.map(({ host, value }) => ({ host, value: value.clones })), unanswered };
}

function notFound(image: string, unanswered: Unanswered): MigrationError {
  const silent = unanswered.map(({ host }) => host).join(', ');
  return new MigrationError('NOT_FOUND', `no image ${image}${silent === '' ? '' : ` on the hosts that answer`}`, {
    ...(silent === '' ? {} : { remedy: `no answer from ${silent}: see "vmctl images --all-hosts"` }),
  });
}

async function stop(
  services: Services,
  clonesOf: ReadonlyMap<string, readonly VmIdentity[]>,
  isForced: boolean,
): Promise<StoppedOnHosts> {
  const outcomes = await callAll(services, [...clonesOf.keys()], ORDER_MS_MAX, ({ images }, host) =>
    images.stopClones(
      (clonesOf.get(host) ?? []).map(({ name, uuid }) => ({ name, uuid })),
      isForced,
    ),
  );
  const { values, unanswered } = split(services, outcomes);
  return {
    stopped: values.flatMap(({ value }) => [...value.stopped]),
    failures: values.flatMap(({ host, value }) =>
      value.failures.map(({ name, error }) => ({ name, host, error: MigrationError.from(error, host).toJSON() })),
    ),
    unanswered,
  };
}

async function ask<T>(services: Services, hosts: readonly string[], question: (host: Host) => Promise<T>) {
  return split(services, await callAll(services, hosts, ANSWER_MS_MAX, question));
}

/** Throws the error of this host, which is the one that the client has asked. */
function split<T>({ host: self }: Services, outcomes: readonly Outcome<T>[]) {
  const values: { readonly host: string; readonly value: T }[] = [];
  const unanswered: Unanswered = [];
  for (const outcome of outcomes) {
    const { host } = outcome;
    if ('value' in outcome) values.push(outcome);
    else if (host === self) throw outcome.error;
    else unanswered.push({ host, error: whyUnanswered(host, outcome.error).toJSON() });
  }
  return { values, unanswered };
}

function whyUnanswered(host: string, error: MigrationError): MigrationError {
  if (!UNKNOWN_CALL_CODES.has(error.code)) return error;
  return new MigrationError('UNSUPPORTED', `${host} runs an earlier build, which cannot be asked`, {
    remedy: `upgrade vmigrated on ${host}`,
    cause: error,
  });
}

function callAll<T>(
  services: Services,
  hosts: readonly string[],
  deadlineMs: number,
  call: (host: Host, name: string) => Promise<T>,
): Promise<Outcome<T>[]> {
  return Promise.all(
    hosts.map(async (host): Promise<Outcome<T>> => {
      try {
        const port = host === services.host ? services.agent : services.peers.agent(host);
        return { host, value: await inTime(host, deadlineMs, call(port, host)) };
      } catch (error) {
        return { host, error: toMigrationError(error) };
      }
    }),
  );
}

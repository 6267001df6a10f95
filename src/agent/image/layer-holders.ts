/**
 * Who needs a disk layer. A layer is merged or removed only when no image, clone or saved file on any host names it. A
 * host that cannot be asked counts as a holder, because it may be one.
 *
 * A daemon of build 0.1.0 does not know the question. It counts as a holder if it can read the file: then it may have
 * loaded a saved image of it.
 */
import { type ErrorCode, toMigrationError } from '../../domain/errors.js';
import type { KeptLayer } from '../../domain/image.js';
import type { VmSpec } from '../../domain/vm.js';
import type { InventoryPort } from '../../engine/ports/inventory.js';
import { inTime } from '../../kit/in-time.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ImageContext } from './context.js';
import type { ImageRecord } from './record.js';

/** The other hosts of the cluster. */
export interface OtherHosts {
  readonly names: readonly string[];
  agent(host: string): { readonly inventory: InventoryPort };
}

export const NO_OTHER_HOSTS: OtherHosts = {
  names: [],
  agent: (host) => {
    throw new RangeError(`no host ${host}`);
  },
};

/** Returns all files that the image's disks consist of. */
export function layerPaths({ disks, layers = [] }: ImageRecord): string[] {
  return [...new Set([...disks, ...layers.flatMap(({ files }) => files)].map(({ path }) => path))];
}

/**
 * Returns what on this host needs one of the files: images, saved files, and VMs that have it open. Each is described
 * for a person. `flattened` is the VM whose own overlays are to be merged: it does not count, nor does an image of
 * which only those overlays are left.
 */
export async function holdersHere(
  { images, vms }: Pick<ImageContext, 'images' | 'vms'>,
  paths: readonly string[],
  flattened: string | null = null,
): Promise<string[]> {
  const asked = new Set(paths);
  const holders: string[] = [];
  for (const image of images.all()) {
    if (!layerPaths(image).some((path) => asked.has(path)) || waitsFor(image, flattened)) continue;
    holders.push(...holdersOfImage(image));
  }
  const isUp = ({ state }: ManagedVm) => state === 'running' || state === 'paused';
  for (const vm of vms.all()) {
    const { name, disks } = vm.spec;
    if (name === flattened || vm.state === 'stopped' || vm.state === 'departed') continue;
    const isNamed = disks.some(({ path }) => asked.has(path));
    if (isNamed || (isUp(vm) && disks.length > 0 && (await hasOpen(vm, paths)))) holders.push(`VM ${name}`);
  }
  return holders;
}

/** True if the image stays only because the VM's overlays are not merged. */
function waitsFor({ state, overlays, saves = [] }: ImageRecord, vm: string | null): boolean {
  return state === 'unloaded' && saves.length === 0 && overlays.every((overlay) => overlay.vm === vm);
}

function holdersOfImage({ id, state, saves = [] }: ImageRecord): string[] {
  const files = saves.map(({ path }) => `saved image ${path}`);
  return state === 'unloaded' && files.length > 0 ? files : [`image ${id}`, ...files];
}

async function hasOpen({ process }: ManagedVm, paths: readonly string[]): Promise<boolean> {
  for (const path of paths) if (await process.disks.isOpen(path)) return true;
  return false;
}

/** Returns, for all other hosts, who needs one of the files, or that the host cannot be asked. */
export async function holdersElsewhere(
  others: OtherHosts,
  spec: VmSpec,
  paths: readonly string[],
  flattened: string | null = null,
): Promise<string[]> {
  const answers = await Promise.all(
    others.names.map(async (host) => {
      const { inventory } = others.agent(host);
      try {
        const { holders } = await inventory.layerHolders(paths, flattened);
        return holders.map((holder) => `${holder} on ${host}`);
      } catch (error) {
        return holdersOnOldHost(inventory, host, spec, { paths, error });
      }
    }),
  );
  return answers.flat();
}

/** How long the start of a VM waits for the other hosts. */
const ASK_BEFORE_RUN_MS = 2_000;

/** Returns the images and saved files on other hosts that need the file, and the hosts that did not answer in time. */
export async function imagesElsewhere(
  others: OtherHosts,
  path: string,
): Promise<{ holders: string[]; silent: string[] }> {
  const holders: string[] = [];
  const silent: string[] = [];
  const ask = async (host: string): Promise<void> => {
    try {
      const { inventory } = others.agent(host);
      const answer = await inTime(host, ASK_BEFORE_RUN_MS, inventory.layerHolders([path], null));
      // A VM there is no image. Its lock on the disk is QEMU's matter.
      holders.push(...answer.holders.filter((holder) => !holder.startsWith('VM ')).map((text) => `${text} on ${host}`));
    } catch {
      silent.push(host);
    }
  };
  await Promise.all(others.names.map(ask));
  return { holders, silent };
}

/** How a daemon answers a call that it does not know. */
const UNKNOWN_CALL_CODES: ReadonlySet<ErrorCode> = new Set(['NOT_FOUND', 'USAGE', 'UNSUPPORTED']);

async function holdersOnOldHost(
  inventory: InventoryPort,
  host: string,
  spec: VmSpec,
  { paths, error }: { paths: readonly string[]; error: unknown },
): Promise<string[]> {
  const unasked = [`host ${host}, which cannot be asked (${toMigrationError(error).message})`];
  if (!UNKNOWN_CALL_CODES.has(toMigrationError(error).code)) return unasked;
  const disks = paths.map((path, index) => ({ id: `disk${index}`, path, format: 'raw' as const, isReadOnly: true }));
  try {
    const checks = await inventory.checkTarget({ ...spec, disks }, null);
    const isShared = checks.disks.some(({ isReadable }) => isReadable);
    return isShared ? [`host ${host}, whose older build cannot say (it has the file)`] : [];
  } catch {
    return unasked;
  }
}

/** Returns one line for each file that somebody needs. */
export function keptBecause(paths: readonly string[], holders: readonly string[]): KeptLayer[] {
  const more = holders.length > 3 ? ` and ${holders.length - 3} more` : '';
  const reason = `needed by ${holders.slice(0, 3).join(', ')}${more}`;
  return holders.length === 0 ? [] : paths.map((path) => ({ path, reason }));
}

/**
 * The disks of a VM that is forked. What it has written so far becomes a base that nobody writes to any more, and it
 * goes on in an overlay beside it: one transaction of QEMU's for all disks, in the pause of the fork point. A parent
 * that stays stopped needs no overlay.
 *
 * Written down in this order: which overlays there will be (image record) → the overlays → QEMU's transaction → where
 * the parent writes (its own record). Whoever finds this cut short asks QEMU which file it has open.
 */
import { rm } from 'node:fs/promises';
import { activeNodes, closeNode, mergeDown, openOverlay, switchToOverlays } from '../../backends/qemu/block.js';
import { commitOverlay, createOverlay, virtualSizeBytes } from '../../backends/qemu/img.js';
import { MigrationError } from '../../domain/errors.js';
import type { ParentMode } from '../../domain/fork.js';
import type { DiskSpec } from '../../domain/vm.js';
import type { ImageDisk, ParentOverlay } from '../image/record.js';
import { withDisks } from '../vm/record.js';
import type { ManagedVm, VmManager } from '../vm/vms.js';
import type { ForkContext } from './context.js';

export class ParentDisks {
  readonly #context: ForkContext;
  readonly #parent: ManagedVm;
  readonly #image: string;
  #switches: readonly { readonly node: string; readonly overlay: string }[] = [];

  constructor(context: ForkContext, parent: ManagedVm, image: string) {
    this.#context = context;
    this.#parent = parent;
    this.#image = image;
  }

  /** The parent runs. Its overlays are made, and QEMU has opened them. Again as often as wanted. */
  async prepare(mode: ParentMode): Promise<void> {
    const { images } = this.#context;
    const { qmp, spec } = this.#parent;
    const disks = spec.disks.filter(({ isReadOnly }) => !isReadOnly);
    if (mode === 'stop' || disks.length === 0) return;
    const overlays = disks.map((disk) => this.#overlayOf(disk));
    await images.update(this.#image, { overlays });
    const active = await activeNodes(qmp);
    const switches: { node: string; overlay: string }[] = [];
    for (const [index, overlay] of overlays.entries()) {
      const node = active.get(overlay.id)?.node;
      if (node === undefined) throw new MigrationError('CONFLICT', `disk ${overlay.id} of ${spec.name} is not there`);
      const overlayNode = overlayNodeName(this.#image, index);
      await closeNode(qmp, overlayNode);
      await rm(overlay.path, { force: true });
      const { base } = overlay;
      await createOverlay(overlay.path, base, await virtualSizeBytes(base.path, base.format));
      await openOverlay(qmp, overlayNode, overlay.path);
      switches.push({ node, overlay: overlayNode });
    }
    this.#switches = switches;
  }

  /** The parent stands still: all its disks, or none. */
  async snapshot(): Promise<void> {
    if (this.#switches.length > 0) await switchToOverlays(this.#parent.qmp, this.#switches);
  }

  /** Durable when it resolves: the parent's record names the files that it writes to now. */
  async settle(): Promise<void> {
    if (this.#switches.length === 0) return;
    const { vms, images } = this.#context;
    const { overlays } = images.get(this.#image);
    await amendDisks(vms, this.#parent.spec.name, (disk) => overlays.find(({ id }) => id === disk.id) ?? disk);
  }

  /**
   * The parent runs on its own files again; what it has written since goes into them. Nothing to do for one that has
   * ended.
   */
  async undo(): Promise<void> {
    const { vms, images } = this.#context;
    const { name } = this.#parent.spec;
    if (!images.has(this.#image)) return;
    const { overlays } = images.get(this.#image);
    const isThere = vms.has(name) && vms.get(name) === this.#parent && this.#parent.state !== 'stopped';
    for (const [index, overlay] of overlays.entries()) {
      if (isThere) await this.#takeOut(overlay, overlayNodeName(this.#image, index));
      else await mergeOffline(overlay);
      await rm(overlay.path, { force: true });
    }
    if (isThere && overlays.length > 0) {
      await amendDisks(vms, name, (disk) => overlays.find(({ id }) => id === disk.id)?.base ?? disk);
    }
  }

  async #takeOut(overlay: ParentOverlay, node: string): Promise<void> {
    const { qmp } = this.#parent;
    const active = (await activeNodes(qmp)).get(overlay.id);
    if (active?.node === node) {
      const base = this.#switches.find((taken) => taken.overlay === node)?.node ?? `format-${overlay.id}`;
      await mergeDown(qmp, node, node, base);
    }
    await closeNode(qmp, node);
  }

  #overlayOf({ id, path, format }: DiskSpec): ParentOverlay {
    const base: ImageDisk = { id, path, format };
    return { id, path: `${path}.${this.#image}`, format: 'qcow2', vm: this.#parent.spec.name, base };
  }
}

/** Durable when it resolves: the VM's record names these files. */
export async function amendDisks(
  vms: VmManager,
  name: string,
  fileOf: (disk: DiskSpec) => Pick<DiskSpec, 'path' | 'format'>,
): Promise<void> {
  await vms.amend(name, (record) => withDisks(record, fileOf));
}

/** Disks that no snapshot can be taken of, each with why. */
export async function diskBlockers(parent: ManagedVm): Promise<string[]> {
  if (parent.image !== null && parent.spec.disks.some(({ isReadOnly }) => !isReadOnly)) {
    return [`${parent.spec.name} is a clone, whose disks end with it`];
  }
  const known = new Set(parent.spec.disks.map(({ id }) => id));
  const active = await activeNodes(parent.qmp);
  const foreign = [...active].filter(([id, { isReadOnly }]) => !known.has(id) && !isReadOnly);
  return foreign.map(([id, { path }]) => `${id} (${path}) is not among the disks of the spec`);
}

/** The VM that wrote to the overlay has ended. */
export async function mergeOffline(overlay: ParentOverlay): Promise<void> {
  try {
    await commitOverlay(overlay.path);
  } catch (error) {
    const isGone = error instanceof MigrationError && /No such file/i.test(error.message);
    if (!isGone) throw error;
  }
  await rm(overlay.path, { force: true });
}

/** QEMU takes 31 characters, a disk's id may have more. */
export function overlayNodeName(image: string, index: number): string {
  return `vmg-${image}-${index}`;
}

/** The disks of a VM that is forked, and the overlays that they continue in. */
import { MigrationError } from '../../domain/errors.js';
import type { AtSwitch, DiskOverlay, OpenOverlay, VmDisks } from '../vm-disks.js';
import {
  type ActiveNode,
  abandonMerges,
  activeNodes,
  blockJobs,
  closeFile,
  closeNode,
  filesInUse,
  mergeDown,
  nodeOfFile,
  openOverlay,
  switchToOverlays,
} from './block.js';
import type { QemuConnection } from './connection.js';
import { addFile, changeFileList } from './launcher/file-list.js';

export class QemuDisks implements VmDisks {
  readonly #connection: QemuConnection;
  /** How long a merge may make no progress. A test shortens it. */
  stalledMs = 600_000;

  constructor(connection: QemuConnection) {
    this.#connection = connection;
  }

  async active(): Promise<ReadonlyMap<string, ActiveNode>> {
    return activeNodes(this.#connection.qmp);
  }

  async isOpen(path: string): Promise<boolean> {
    return (await nodeOfFile(this.#connection.qmp, path)) !== null;
  }

  async openOverlays(
    image: string,
    overlays: readonly DiskOverlay[],
    create: (overlay: DiskOverlay, index: number) => Promise<void>,
  ): Promise<readonly OpenOverlay[]> {
    const { qmp, place } = this.#connection;
    const active = await activeNodes(qmp);
    const open: OpenOverlay[] = [];
    for (const [index, overlay] of overlays.entries()) {
      const node = active.get(overlay.id)?.node;
      if (node === undefined) throw new MigrationError('CONFLICT', `${place.name} has no disk ${overlay.id}`);
      const overlayNode = overlayNodeName(image, index);
      await closeNode(qmp, overlayNode);
      await create(overlay, index);
      await changeFileList(place, (list) => addFile(list, overlay.path, 'write'));
      await openOverlay(qmp, overlayNode, overlay.path);
      open.push({ node, overlay: overlayNode });
    }
    return open;
  }

  /** All switches are one QMP transaction. */
  switchToOverlays(open: readonly OpenOverlay[]): Promise<void> {
    return switchToOverlays(this.#connection.qmp, open);
  }

  async merge(overlay: DiskOverlay, atSwitch: AtSwitch): Promise<boolean> {
    const { qmp, place } = this.#connection;
    const root = (await activeNodes(qmp)).get(overlay.id)?.node;
    const [top, base] = [await nodeOfFile(qmp, overlay.path), await nodeOfFile(qmp, overlay.base.path)];
    if (root === undefined || top === null || base === null) return false;
    // The base has only been read until now.
    await changeFileList(place, (list) => addFile(list, overlay.base.path, 'write'));
    await mergeDown(qmp, { root, top, base, stalledMs: this.stalledMs }, atSwitch);
    await closeFile(qmp, overlay.path);
    await changeFileList(place, (list) => list.delete(overlay.path));
    return true;
  }

  async jobs(): Promise<readonly string[]> {
    return (await blockJobs(this.#connection.qmp)).map(({ id, type }) => `${type} ${id}`);
  }

  async release(path: string): Promise<boolean> {
    const { qmp, place } = this.#connection;
    if ((await filesInUse(qmp)).has(path)) return false;
    await closeFile(qmp, path);
    await changeFileList(place, (list) => list.delete(path));
    return true;
  }

  abandonMerges(): Promise<void> {
    return abandonMerges(this.#connection.qmp);
  }
}

/** The name has no disk id, because QEMU allows 31 characters and an id may be longer. */
function overlayNodeName(image: string, index: number): string {
  return `vmg-${image}-${index}`;
}

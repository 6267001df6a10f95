/** Answers what a move asks about the files of a VM: on the source with markers, on the target by looking for them. */
import { randomBytes } from 'node:crypto';
import { readdir, realpath, stat } from 'node:fs/promises';
import { basename, isAbsolute, join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import { describeForbidden } from '../../domain/policy.js';
import type { ArgumentFile, FileView, OpenFile, StorageFile, StorageOffer } from '../../domain/storage.js';
import { FORMAT_FILE } from '../../durable/state-format.js';
import { forbiddenOnHost, namingOnly } from '../policy/policy.js';
import type { HostContext } from '../vm/context.js';
import type { ManagedVm } from '../vm/vm.js';
import { WHOLE_BYTES_MAX } from './content.js';
import { mountPoints, unusable, viewFile } from './file-view.js';
import { type Markers, markerPath } from './markers.js';

const PROOF_BYTES = 16;
const FILES_MAX = 256;

type StorageContext = Pick<HostContext, 'vms'> & { readonly markers: Markers };

/** Throws NOT_FOUND if the VM is not here, QEMU_GONE if it does not run. */
export async function offerStorage({ vms, markers }: StorageContext, name: string): Promise<StorageOffer> {
  const vm = vms.get(name);
  const proof = randomBytes(PROOF_BYTES).toString('hex');
  const { diskFiles } = vms.backend;
  const context = { proof, diskFiles, mountPoints: await mountPoints() };
  const named = filesOf(vm, vms.backend.filesIn(vm.spec), await vm.process.facts.openFiles());
  const front = await Promise.all(named.map((file) => viewFile(file, context)));
  const behind = backingFiles(named, front);
  const files = [...named, ...behind];
  if (files.length > FILES_MAX)
    throw new MigrationError('UNSUPPORTED', `${name} uses ${files.length} files; a move compares at most ${FILES_MAX}`);
  const views = [...front, ...(await Promise.all(behind.map((file) => viewFile(file, context))))];
  const open = await openInodes(vm.pid);
  const checked = views.map((view, index) => stillOpen(view, files[index]?.isWritable === true, open));
  return { proof, files, views: await withMarkers(markers, proof, files, checked) };
}

/** Another host asks: it sees only files that the policy allows, and of marks of data sockets only which file it is. */
export async function viewStorage(
  { vms, policy, host }: Pick<HostContext, 'vms' | 'policy' | 'host'>,
  proof: string,
  files: readonly StorageFile[],
): Promise<readonly FileView[]> {
  if (files.length > FILES_MAX) throw new MigrationError('USAGE', `at most ${FILES_MAX} files can be compared`);
  const context = { proof, diskFiles: vms.backend.diskFiles, mountPoints: await mountPoints() };
  return Promise.all(
    files.map(async (file) => {
      const { path, use, format } = file;
      if (basename(path) === FORMAT_FILE) return viewFile({ ...file, isWritable: true, format: null }, context);
      const disk = { id: use, path, format: format ?? 'raw', isReadOnly: true };
      const forbidden = await forbiddenOnHost(namingOnly(disk), policy, vms.backend.diskFiles);
      if (forbidden.length === 0) return viewFile(file, context);
      return unusable(path, `the policy of ${host} does not allow ${describeForbidden(forbidden)}`);
    }),
  );
}

/** Combines what the spec names and what the process has open. A file that either side may write is writable. */
function filesOf(
  { spec, directory }: ManagedVm,
  named: readonly ArgumentFile[],
  open: readonly OpenFile[],
): StorageFile[] {
  const files = new Map<string, StorageFile>();
  const add = (file: StorageFile): void => {
    const path = isAbsolute(file.path) ? file.path : join(directory, file.path);
    const known = files.get(path);
    const first = known ?? { ...file, path };
    files.set(path, { ...first, isWritable: first.isWritable || file.isWritable, format: first.format ?? file.format });
  };
  for (const { id, path, format, isReadOnly } of spec.disks)
    add({ path, use: `disk ${id}`, isWritable: !isReadOnly, format });
  // A clone's memory holds its kernel already, so its process opens neither file.
  const boot = spec.clone === undefined ? [spec.kernel, spec.initrd] : [];
  for (const path of boot) if (path !== undefined) add({ path, use: 'boot file', isWritable: false, format: null });
  for (const { path, use, isWritable } of named) add({ path, use, isWritable, format: null });
  for (const { path, isReadOnly } of open) {
    // A network disk is named by its address.
    if (/^(json:|[a-z][a-z0-9+.-]*:)/i.test(path)) continue;
    add({ path, use: 'a file of a drive', isWritable: !isReadOnly, format: null });
  }
  return [...files.values()];
}

/** The files behind the disks, as far as they are files of a host and not named already. */
function backingFiles(named: readonly StorageFile[], views: readonly FileView[]): StorageFile[] {
  const known = new Set(named.map(({ path }) => path));
  return views.flatMap(({ chain }, index) =>
    chain.slice(1).flatMap(({ path }): StorageFile[] => {
      if (!isAbsolute(path) || known.has(path)) return [];
      known.add(path);
      return [{ path, use: `backing file of ${named[index]?.use ?? 'a disk'}`, isWritable: false, format: null }];
    }),
  );
}

/** The VM's process may have a file open that has been replaced under its path. The target would open the new one. */
function stillOpen(view: FileView, isWritable: boolean, open: ReadonlySet<string> | null): FileView {
  if (!isWritable || view.problem !== null || open === null || open.has(view.inode) || view.kind === 'block')
    return view;
  return { ...view, problem: 'the VM has another file open than the one that is there now' };
}

/** Returns the files that the process has open, or null if they cannot be listed. */
async function openInodes(pid: number): Promise<ReadonlySet<string> | null> {
  const directory = `/proc/${pid}/fd`;
  const numbers = await readdir(directory).catch(() => null);
  if (numbers === null) return null;
  const inodes = numbers.map((number) =>
    stat(join(directory, number), { bigint: true }).then(
      ({ dev, ino }) => `${dev}:${ino}`,
      () => '',
    ),
  );
  return new Set(await Promise.all(inodes));
}

/** A short file that the VM only reads is compared by its content, so that no marker is left beside a kernel. */
function needsMarker({ isWritable }: StorageFile, { problem, kind, sizeBytes }: FileView): boolean {
  return problem === null && kind === 'file' && (isWritable || sizeBytes > WHOLE_BYTES_MAX);
}

async function withMarkers(
  markers: Markers,
  proof: string,
  files: readonly StorageFile[],
  views: readonly FileView[],
): Promise<FileView[]> {
  const places = new Map<FileView, string>();
  for (const [index, view] of views.entries()) {
    const file = files[index];
    if (file !== undefined && needsMarker(file, view)) places.set(view, await realpath(view.path));
  }
  const { secret, problems } = await markers.leave(proof, [...places.values()]);
  return views.map((view) => {
    const place = places.get(view);
    if (place === undefined) return view;
    const markerProblem = problems.get(markerPath(proof, place)) ?? null;
    return { ...view, markerProblem, marker: markerProblem === null ? secret : null };
  });
}

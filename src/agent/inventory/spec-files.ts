/**
 * Whether this host can use the files that a user's spec names, looked at before the VM is made: QEMU's own words name
 * no key of the spec.
 */
import type { DiskFiles } from '../../backends/disk-files.js';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import { isOfTheFile, withFile } from '../image/layers.js';

/**
 * Throws SPEC_INVALID, naming every file that cannot be used. A limit of the host and a file system that does not
 * answer are no fault of the spec, and are thrown as they are.
 */
export async function refuseUnusableFiles(files: DiskFiles, spec: VmSpec): Promise<void> {
  const boot = [
    ...(spec.kernel === undefined ? [] : [{ key: 'kernel', path: spec.kernel }]),
    ...(spec.initrd === undefined ? [] : [{ key: 'initrd', path: spec.initrd }]),
  ];
  const disks = spec.disks.map(({ id, path, format }) => ({ key: `disk ${id}`, path, format }));
  const looks = [...boot.map((file) => ({ ...file, format: 'raw' as const })), ...disks];
  const problems = await Promise.all(
    looks.map(async ({ key, path, format }) => {
      const problem = (await openProblem(path)) ?? (await files.openProblem(path, format));
      return problem === null ? [] : [`${key}: ${problem}`];
    }),
  );
  const all = problems.flat();
  if (all.length === 0) return;
  throw new MigrationError('SPEC_INVALID', `${spec.name} cannot start: ${all.join('; ')}`, {
    remedy: 'correct the path in the spec, or put the file there',
  });
}

async function openProblem(path: string): Promise<string | null> {
  try {
    await withFile(path, async () => undefined);
    return null;
  } catch (error) {
    if (isOfTheFile(error)) return error.message;
    throw error;
  }
}

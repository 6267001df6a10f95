/**
 * VMs whose record cannot be read. Such a VM may run, so it is shown, keeps its name, and nothing of it is deleted.
 * Only `vmctl state repair` or a person can tell what it is.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import type { VmBackend, VmPlace } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { VmView } from '../../domain/vm.js';
import { VM_RECORD_FILE } from '../../durable/state-format.js';
import type { ProcessIdentity } from '../../kit/process.js';
import { accel, imageId } from '../../schemas/words.js';
import { placeIn } from './vm.js';

export interface UnreadableVm {
  readonly view: VmView;
  /** Why the record cannot be read. */
  readonly error: MigrationError;
}

/** What a damaged record still says. It is only shown: nothing is decided by it. */
const hint = z.looseObject({
  spec: z
    .looseObject({
      uuid: z.string().max(64).catch(''),
      machine: z.string().max(64).catch(''),
      memory: z.looseObject({ sizeBytes: z.number().min(0).catch(0) }).catch({ sizeBytes: 0 }),
    })
    .catch({ uuid: '', machine: '', memory: { sizeBytes: 0 } }),
  accel: accel.catch('tcg'),
  epoch: z.int().min(0).catch(0),
  image: imageId.nullable().catch(null),
});

/** Returns the processes of a VM whose record does not say where its sockets are. */
export async function strayIn(
  directory: string,
  name: string,
  backend: Pick<VmBackend, 'findStray'>,
): Promise<readonly ProcessIdentity[]> {
  const places = [false, true].map((isContained) => placeIn(directory, name, isContained));
  return (await Promise.all(places.map((place) => backend.findStray(place)))).flat();
}

/** Describes the VM at `place`, and finds its process by its command line. */
export async function describeUnreadable(
  place: VmPlace,
  error: MigrationError,
  { host, backend }: { host: string; backend: VmBackend },
): Promise<UnreadableVm> {
  const { spec, ...said } = hint.parse(await jsonOf(join(place.directory, VM_RECORD_FILE)));
  const process = (await strayIn(place.directory, place.name, backend))[0];
  const view: VmView = {
    name: place.name,
    uuid: spec.uuid,
    host,
    state: 'unreadable',
    epoch: said.epoch,
    memoryBytes: spec.memory.sizeBytes,
    pid: process?.pid ?? null,
    machine: spec.machine,
    accel: said.accel,
    job: null,
    serialLog: place.serialLogPath,
    image: said.image,
    exitCode: null,
    exit: null,
    identityIssue: null,
  };
  return { view, error };
}

/** A process whose record is gone, for example because the state directory has come back from a backup. */
export function noRecord(directory: string, pid: number): MigrationError {
  return new MigrationError('CORRUPT', `${directory} has no record, but process ${pid} runs`, {
    remedy: `bring its ${VM_RECORD_FILE} back and restart vmigrated; or end it ("kill ${pid}") and restart vmigrated`,
  });
}

/** The answer to every call for such a VM. */
export function refusal({ view, error }: UnreadableVm): MigrationError {
  const runs = view.pid === null ? 'it does not seem to run' : `its process ${view.pid} runs on`;
  return new MigrationError('CORRUPT', `the record of ${view.name} cannot be read; ${runs}`, {
    remedy: error.remedy ?? 'stop vmigrated, then: vmctl state check DIR, and vmctl state repair DIR',
    cause: error,
  });
}

async function jsonOf(path: string): Promise<object> {
  try {
    const json: unknown = JSON.parse(await readFile(path, 'utf8'));
    return typeof json === 'object' && json !== null ? json : {};
  } catch {
    return {};
  }
}

/** Starts the QEMU of one VM: the process first, then the QMP connection. */
import { mkdir } from 'node:fs/promises';
import { MigrationError } from '../../domain/errors.js';
import type { LaunchOrder, StartedVm, VmPlace } from '../backend.js';
import { qemuArguments } from './command-line.js';
import type { QemuConnection } from './connection.js';
import { changeFileList, writeFileList } from './launcher/file-list.js';
import { launched, rootPath, SPOOLED_SERIAL, SPOOLED_SERIAL_PATH, untilKept } from './launcher/launcher.js';
import { openedFiles, withoutStart } from './opened-files.js';
import { outputTail, type StartedProcess, saidBy, startDetached } from './start.js';

/** A cold start takes 50 ms. The limit allows for a machine that is busy with hundreds of starts. */
const START_TIMEOUT_MS = 30_000;
const OUTPUT_KEPT_MS = 500;
const CONTAINED_REMEDY =
  'QEMU is contained, and opens only files that the VM names (docs/SECURITY.md); security.qemuUser: root changes that';

/** `hasLauncher`: if the launcher is missing, the logs grow without limit, and nothing can be contained. */
export async function launch(
  connection: QemuConnection,
  { program, hasLauncher }: { program: string; hasLauncher: boolean },
  order: LaunchOrder,
): Promise<StartedVm> {
  const { place } = connection;
  const { container } = order;
  if (container !== null) await prepareContainer(order, place, hasLauncher);
  const serialLogPath = hasLauncher ? SPOOLED_SERIAL_PATH : place.serialLogPath;
  const qemu = {
    program,
    args: [...(hasLauncher ? SPOOLED_SERIAL : []), ...commandLine(connection, order, serialLogPath)],
    environment: order.environment,
  };
  const command = order.enclose(hasLauncher ? launched(qemu, place, container) : qemu);
  const started = await startDetached(command.program, command.args, {
    outputPath: place.outputPath,
    directory: place.directory,
    environment: command.environment,
    inputPaths: order.statePath === undefined ? [] : [order.statePath],
    onSpawned: order.onSpawned,
  });
  connection.started();
  const traits = { hasPostcopy: container?.hasPostcopy === true, isContained: container !== null };
  return { ...started, ready: (mapped, signal) => ready(connection, { ...started, ...traits }, mapped, signal) };
}

async function prepareContainer(order: LaunchOrder, place: VmPlace, hasLauncher: boolean): Promise<void> {
  if (!hasLauncher) {
    throw new MigrationError(
      'UNSUPPORTED',
      'the program vmigrate-launcher is missing, so that QEMU cannot be contained',
      {
        remedy: 'build the native parts again (npm run build:native), or set security.qemuUser: root',
      },
    );
  }
  await mkdir(rootPath(place), { recursive: true, mode: 0o700 });
  await writeFileList(place, await openedFiles(order));
}

async function ready(
  connection: QemuConnection,
  { exited, hasPostcopy, isContained }: StartedProcess & { hasPostcopy: boolean; isContained: boolean },
  mapped: (signal: AbortSignal) => Promise<void>,
  cancelled: AbortSignal,
): Promise<void> {
  const { directory, outputPath } = connection.place;
  const hasDied = new AbortController();
  const signal = AbortSignal.any([hasDied.signal, cancelled]);
  const died = exited.then(async (exit) => {
    hasDied.abort();
    await untilKept(directory, OUTPUT_KEPT_MS);
    const tail = await outputTail(outputPath);
    const how = exit.signal === null ? `with exit code ${exit.code}` : `by ${exit.signal}`;
    const isRefused =
      isContained && /No such file|Permission denied|not permitted|Read-only file|[Cc]ould not (load|open)/.test(tail);
    const remedy = isRefused ? { remedy: CONTAINED_REMEDY } : {};
    throw new MigrationError('QEMU_FAILED', `QEMU ended ${how} while starting: ${tail}`, {
      ...remedy,
      ...saidBy(tail),
    });
  });
  const answering = (async () => {
    // QEMU makes its sockets before its memory. So with a preload the sockets exist when the memory is mapped.
    await mapped(signal);
    await connection.open({ timeoutMs: START_TIMEOUT_MS, signal, isRetrying: true });
    if (!hasPostcopy) await changeFileList(connection.place, withoutStart);
  })();
  // QMP closes before the exit of QEMU is reported. QEMU's own message is the better reason, so the code waits for it.
  const answeringOrDied = answering.catch(async (error: unknown) => {
    const isOver = error instanceof MigrationError && (error.code === 'QEMU_GONE' || hasDied.signal.aborted);
    if (isOver) await Promise.race([died, new Promise((resolve) => setTimeout(resolve, 1000))]);
    throw error;
  });
  died.catch(() => undefined);
  await Promise.race([answeringOrDied, died]);
}

function commandLine({ place, sockets }: QemuConnection, order: LaunchOrder, serialLogPath: string): string[] {
  const { spec, accel, ramPaths, taps, isIncoming, diskSockets = {} } = order;
  return qemuArguments(spec, {
    ...{ accel, ramPaths, taps, isIncoming, diskSockets },
    qmpPath: sockets.qmp,
    monitorPath: sockets.monitor,
    serialPath: place.serialPath,
    serialLogPath,
    agentPath: place.agentPath,
  });
}

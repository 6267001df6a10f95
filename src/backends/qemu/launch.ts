/** Starts the QEMU of one VM: the process first, then the QMP connection. */
import { MigrationError } from '../../domain/errors.js';
import type { LaunchOrder, StartedVm } from '../backend.js';
import { qemuArguments } from './command-line.js';
import type { QemuConnection } from './connection.js';
import { SPOOLED_SERIAL_PATH, spooled, untilKept } from './spool.js';
import { outputTail, type StartedProcess, saidBy, startDetached } from './start.js';

/** A cold start takes 50 ms. The limit allows for a machine that is busy with hundreds of starts. */
const START_TIMEOUT_MS = 30_000;
const OUTPUT_KEPT_MS = 500;

/** `spool`: the program that bounds the logs, or null if there is none. Then the logs grow without limit. */
export async function launch(
  connection: QemuConnection,
  { program, spool }: { program: string; spool: string | null },
  order: LaunchOrder,
): Promise<StartedVm> {
  const { place } = connection;
  const serialLogPath = spool === null ? place.serialLogPath : SPOOLED_SERIAL_PATH;
  const qemu = { program, args: commandLine(connection, order, serialLogPath), environment: order.environment };
  const command = order.enclose(spool === null ? qemu : spooled(qemu, spool, place));
  const started = await startDetached(command.program, command.args, {
    outputPath: place.outputPath,
    directory: place.directory,
    environment: command.environment,
    inputPaths: order.statePath === undefined ? [] : [order.statePath],
    onSpawned: order.onSpawned,
  });
  connection.started();
  return { ...started, ready: (mapped, signal) => ready(connection, started, mapped, signal) };
}

async function ready(
  connection: QemuConnection,
  { exited }: StartedProcess,
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
    throw new MigrationError('QEMU_FAILED', `QEMU ended ${how} while starting: ${tail}`, saidBy(tail));
  });
  const answering = (async () => {
    // QEMU makes its sockets before its memory. So with a preload the sockets exist when the memory is mapped.
    await mapped(signal);
    await connection.open({ timeoutMs: START_TIMEOUT_MS, signal, isRetrying: true });
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

#!/usr/bin/env -S node --lite-mode --no-expose-wasm --max-lazy --max-semi-space-size=1
/**
 * The daemon's entry point: flags → configuration → daemon, and signals. The daemon does a few calls a second, so
 * optimized code is not worth its memory. The first line tells V8 so, which lowers resident memory by some 20 MiB
 * (Node 20). If started as `node vmigrated.js`, the program sets the flags that V8 accepts at run time, before it loads
 * the other parts, and takes some 3 MiB more. Setting `--lite-mode` at run time would crash it.
 */
import { parseArgs } from 'node:util';
import { setFlagsFromString } from 'node:v8';
import type { DaemonConfigInput } from '../config.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';

const USAGE = `Usage: vmigrated --config FILE
       vmigrated --name A --api unix:PATH [--api https://IP:PORT] --data IP[:PORT] [--data rdma://IP[:PORT]]
                 --state DIR [--ram-dir DIR] [--accel auto|kvm|tcg] [--peer B=https://IP:PORT]... [--tls DIR]
                 [--log-level LEVEL] [--test-faults]

A flag takes precedence over the file. --test-faults honours VMIGRATE_FAULT and is for tests only.
`;
const SMALL_AT_RUN_TIME = ['--no-opt', '--optimize-for-size', '--semi-space-growth-factor=1'];
const EXIT_FAILED = 1;
const EXIT_USAGE = 2;
/** Undoing a job that is not committed may take some seconds; what is left is done by the next daemon. */
const CLOSE_MS_MAX = 15_000;

const OPTIONS = {
  config: { type: 'string' },
  name: { type: 'string' },
  api: { type: 'string', multiple: true },
  data: { type: 'string', multiple: true },
  state: { type: 'string' },
  'ram-dir': { type: 'string' },
  accel: { type: 'string' },
  peer: { type: 'string', multiple: true },
  tls: { type: 'string' },
  'log-level': { type: 'string' },
  'test-faults': { type: 'boolean' },
  help: { type: 'boolean', short: 'h' },
  version: { type: 'boolean' },
} as const;

function readFlags() {
  try {
    return parseArgs({ options: OPTIONS, strict: true, allowPositionals: false }).values;
  } catch (error) {
    throw new MigrationError('USAGE', (error as Error).message, { cause: error });
  }
}

type Flags = ReturnType<typeof readFlags>;

/** Returns the flags that were given. Their values are checked later, together with those of the file. */
function flagsAsConfig(flags: Flags): DaemonConfigInput {
  const [data, rdmaAddress] = [false, true].map((isRdma) => dataAddressOf(flags.data, isRdma));
  const pairs: readonly (readonly [keyof DaemonConfigInput, unknown])[] = [
    ['name', flags.name],
    ['api', flags.api],
    ['data', data],
    ['rdma', rdmaAddress === undefined ? undefined : { address: rdmaAddress }],
    ['state', flags.state],
    ['ramDir', flags['ram-dir']],
    ['accel', flags.accel],
    ['peers', flags.peer === undefined ? undefined : parsePeers(flags.peer)],
    ['tls', flags.tls],
    ['logLevel', flags['log-level']],
    ['testFaults', flags['test-faults']],
  ];
  return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
}

/** Returns the data address of one of the two kinds. Throws USAGE if there are several of that kind. */
function dataAddressOf(addresses: readonly string[] | undefined, isRdma: boolean): string | undefined {
  const [first, second] = (addresses ?? []).filter((address) => address.startsWith('rdma://') === isRdma);
  if (second !== undefined) throw new MigrationError('USAGE', `--data ${second}: ${first ?? ''} is given already`);
  return first;
}

function parsePeers(peers: readonly string[]): Record<string, string> {
  return Object.fromEntries(
    peers.map((peer) => {
      const [, name, url] = /^([^=]+)=(.+)$/.exec(peer) ?? [];
      if (name === undefined || url === undefined)
        throw new MigrationError('USAGE', `--peer "${peer}" is not NAME=https://ADDRESS:PORT`);
      return [name, url];
    }),
  );
}

async function run(): Promise<void> {
  const flags = readFlags();
  if (flags.help === true) {
    process.stdout.write(USAGE);
    return;
  }
  const { VERSION } = await import('./version.js');
  if (flags.version === true) {
    process.stdout.write(`${VERSION}\n`);
    return;
  }
  if (!process.execArgv.includes('--lite-mode')) for (const flag of SMALL_AT_RUN_TIME) setFlagsFromString(flag);
  const { loadConfig } = await import('../config.js');
  const config = await loadConfig(flags.config ?? null, flagsAsConfig(flags));
  const { newLog, startDaemon } = await import('../daemon/daemon.js');
  const log = newLog(config);
  process.on('uncaughtException', (error) => {
    // All answered state is on disk, so a restart is safe. Continuing with unknown state in memory is not.
    log.fatal({ err: error }, 'uncaught exception: a bug in vmigrated');
    process.exit(EXIT_FAILED);
  });
  const daemon = await startDaemon(config, log, VERSION);
  let isClosing = false;
  const shutDown = (signal: NodeJS.Signals): void => {
    if (isClosing) return;
    isClosing = true;
    log.info({ signal }, 'closing; the VMs keep running');
    setTimeout(() => {
      // All answered state is on disk, as after a crash. An ordinary exit would wait for a thread that hangs in a call.
      log.error({}, `a part of the daemon has not ended within ${CLOSE_MS_MAX} ms: the daemon is killed`);
      process.kill(process.pid, 'SIGKILL');
    }, CLOSE_MS_MAX).unref();
    daemon.close().then(
      () => process.exit(0),
      (error: unknown) => {
        log.fatal({ err: error }, 'closing failed');
        process.exit(EXIT_FAILED);
      },
    );
  };
  process.on('SIGTERM', shutDown);
  process.on('SIGINT', shutDown);
  log.info({ version: VERSION, api: config.api, data: config.data, peers: Object.keys(config.peers) }, 'ready');
  process.stdout.write(`vmigrated ${config.name} is ready (pid ${process.pid})\n`);
}

try {
  await run();
} catch (thrown) {
  const error = toMigrationError(thrown);
  const { errorText } = await import('./error-text.js');
  process.stderr.write(errorText('vmigrated', error.toJSON()));
  const isUsage = error.code === 'USAGE' || error.code === 'SPEC_INVALID';
  process.exit(isUsage ? EXIT_USAGE : EXIT_FAILED);
}

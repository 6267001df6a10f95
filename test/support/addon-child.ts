/**
 * Plays a daemon in a separate process, for tests that end it abnormally. Its arguments are MODE and JSON with `scene`
 * (a directory made by the parent), `address` (of the parent's source session with its keys; not for images) and
 * `lengthMiB`. It prints `ready SNAPSHOT` when pages are being transferred, or when an image's parent is protected.
 */
import { existsSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { SourceAddress } from '../../src/native/types.js';

const mode = process.argv[2] ?? '';
const { scene, address, lengthMiB } = JSON.parse(process.argv[3] ?? '{}') as {
  scene: string;
  address: SourceAddress;
  lengthMiB: number;
};
const binding = loadNativeBinding();
const region = { path: join(scene, 'target0'), lengthBytes: BigInt(lengthMiB) << 20n, pageBytes: 4096 };

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2));
}

const replacer = (_: string, value: unknown): unknown => (typeof value === 'bigint' ? `${value}n` : value);

/** Starts a session that takes long, with everything that it needs. */
async function startSession() {
  if (!existsSync(region.path)) binding.createRegionFile(region);
  const onEdge = (): void => undefined;
  const socketPath = join(scene, 'preload.sock');
  const memory = binding.listenForVm({ socketPath, regions: [region], isIncoming: true, onEdge });
  process.stdout.write('listening\n');
  await until(() => memory.snapshot().state === 'complete');
  const target = binding.openTargetSession(memory, {
    regions: [{ ...region, presencePath: `${region.path}.presence` }],
    bandwidthBytesPerS: 2 << 20,
    isResume: false,
    onEdge,
  });
  await target.connect(address, 5000);
  target.start();
  await until(() => target.snapshot().counters.pagesPresent > 100n);
  process.stdout.write(`ready ${JSON.stringify(memory.snapshot(), replacer)}\n`);
  return { memory, target };
}

/** Protects the memory of a parent whose files the test has filled. */
async function armImage(): Promise<void> {
  const source = { ...region, path: join(scene, 'ram0') };
  const socketPath = join(scene, 'preload.sock');
  const memory = binding.listenForVm({ socketPath, regions: [source], isIncoming: false, onEdge: () => undefined });
  process.stdout.write('listening\n');
  await until(() => memory.snapshot().state === 'complete');
  binding.createRegionFile(region);
  const image = [{ ...region, presencePath: `${region.path}.presence` }];
  const options = { parent: memory, source: [source], image, isResume: false, onEdge: () => undefined };
  await binding.openImageCapture(options).arm();
  process.stdout.write(`ready ${JSON.stringify(memory.snapshot(), replacer)}\n`);
}

function startWorker(workerMode: string): Worker {
  // In Node 20, workers do not get the TypeScript loader of the main thread.
  const self = JSON.stringify(import.meta.url);
  const loadSelf = `import('tsx/esm/api').then(({ tsImport }) => tsImport(${self}, ${self}))`;
  const worker = new Worker(loadSelf, { eval: true, argv: [workerMode, process.argv[3]], stdout: true });
  worker.stdout.pipe(process.stdout);
  return worker;
}

switch (mode) {
  // Runs until it is killed.
  case 'run': {
    const { target } = await startSession();
    setInterval(() => target.snapshot(), 1000);
    break;
  }
  // Begins an image, then ends by itself, by a call, or because nothing is left to do.
  case 'image-exit':
    await armImage();
    process.exit(7);
    break;
  case 'image-end':
    await armImage();
    break;
  case 'exit':
    await startSession();
    process.exit(7);
    break;
  // Ends because nothing is left to do, with everything open.
  case 'end':
    await startSession();
    break;
  // Exits while a connect waits for an answer that never comes.
  case 'exit-connecting': {
    const { target, memory } = await startSession();
    await target.close();
    const mute = createServer(() => undefined).listen(0, '127.0.0.1');
    await until(() => mute.listening);
    const again = binding.openTargetSession(memory, {
      regions: [{ ...region, presencePath: `${region.path}.presence` }],
      bandwidthBytesPerS: 0,
      isResume: true,
      onEdge: () => undefined,
    });
    const port = (mute.address() as { port: number }).port;
    again.connect({ ...address, port }, 1500).catch(() => undefined);
    setTimeout(() => process.exit(7), 100);
    break;
  }
  // Drops every handle without closing it.
  case 'collect': {
    await startSession();
    for (let round = 0; round < 5; round++) {
      (globalThis as unknown as { gc: () => void }).gc();
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    process.stdout.write('collected\n');
    break;
  }
  // The worker's environment ends while its session fills; that of the main thread continues.
  case 'worker': {
    const worker = startWorker('run');
    await new Promise<void>((resolve) => {
      worker.stdout.on('data', (chunk: Buffer) => {
        if (chunk.includes('ready')) resolve();
      });
    });
    await worker.terminate();
    process.stdout.write(`worker ended ${binding.support().minorShmem}\n`);
    break;
  }
  case 'worker-exit-connecting': {
    const worker = startWorker('exit-connecting');
    worker.once('exit', (code) => process.stdout.write(`worker ended ${code}\n`));
    break;
  }
  default:
    throw new Error(`unknown mode ${mode}`);
}

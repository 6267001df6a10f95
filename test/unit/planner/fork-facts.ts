import type { CloneIdentity, ForkRequest } from '../../../src/domain/fork.js';
import type { ForkInventory } from '../../../src/domain/host.js';
import type { ImageView } from '../../../src/domain/image.js';
import type { ForkPort, ForkProgress } from '../../../src/engine/ports/fork.js';
import { vm } from './planner-facts.js';

const MIB = 1024 * 1024;
export const IMAGE = '00112233445566ff';

export const forkRequest: ForkRequest = {
  vm: 'vm1',
  image: null,
  cloneCount: 3,
  namePrefix: null,
  parentMode: 'continue',
  memory: 'cow',
  network: 'fresh',
  disks: 'overlay',
  isPartialAllowed: false,
};

export const image: ImageView = {
  id: IMAGE,
  host: 'A',
  state: 'complete',
  parent: 'vm1',
  createdAt: '2030-01-01T00:00:00Z',
  memoryBytes: 512 * MIB,
  allocatedBytes: 100 * MIB,
  pageBytes: 4096,
  deviceStateBytes: 300_000,
  pagesTotal: 131_072,
  pagesDone: 131_072,
  disks: [],
  clones: [],
};

/** Facts with which `forkRequest` is accepted. */
export const forkInventory: ForkInventory = {
  vm: { ...vm, owner: 'A' },
  image: null,
  escapingDevices: [],
  isWriteProtectSupported: true,
  hasPreload: true,
  isFilling: false,
  diskBlockers: [],
  imageBytesFree: 1024 * MIB,
  memoryAvailableBytes: 4096 * MIB,
  imageBytesNeeded: 512 * MIB,
  cloneBytesNeeded: 32 * MIB,
  warmCloneCount: 0,
  namesTaken: [],
};

export function identity(index: number, cloneCount = 3): CloneIdentity {
  return {
    index,
    cloneCount,
    name: `vm1-${index}`,
    uuid: `00000000-0000-4000-8000-00000000000${index}`,
    vmGenerationId: `10000000-0000-4000-8000-00000000000${index}`,
    macs: { n0: `52:54:00:00:01:0${index}` },
  };
}

export const filled: ForkProgress = {
  state: 'complete',
  error: null,
  pagesTotal: 100,
  pagesDone: 100,
  pageBytes: 4096,
  counters: { copiedBytes: 122_880, pagesZero: 70, parentFaultCount: 5, cloneFaultCount: 7 },
  committed: {
    image: IMAGE,
    isWarm: true,
    clones: [0, 1, 2].map((index) => identity(index)),
    failures: [],
    parentPauseMs: 12.5,
    deviceStateBytes: 300_000,
    ready: [0, 1, 2].map((index) => ({ index, at: '2100-01-01T00:00:00Z' })),
  },
};

/** The answers of a scripted agent, unless a test gives others. */
export const forkAnswers: { readonly [Call in keyof ForkPort]: unknown } = {
  forkInventory,
  prepareClones: { image: IMAGE, isWarm: true, clones: [0, 1, 2].map((index) => identity(index)), failures: [] },
  armParent: undefined,
  forkPoint: { parentPauseMs: 12.5, deviceStateBytes: 300_000, parts: [{ name: 'saveState', ms: 8 }] },
  serveImage: {
    session: '5'.repeat(32),
    token: '6'.repeat(64),
    endpoint: {
      transport: 'tcp',
      host: '10.0.0.1',
      port: 7401,
      keys: [{ ram: 'a'.repeat(48), dataMap: 'b'.repeat(48) }],
    },
  },
  imageDigests: { digests: 'MTIzNDU2Nzg5MDEyMzQ1Ng==' },
  endImage: undefined,
  connectImage: undefined,
  completeImage: undefined,
  sendForkState: { failures: [] },
  loadClones: { failures: [] },
  commitFork: undefined,
  runClones: { ready: [0, 1, 2].map((index) => ({ index, atMs: 10 + index })), failures: [] },
  forkProgress: filled,
  finishFork: undefined,
  forkDecision: { decision: 'open' },
  discardFork: undefined,
};

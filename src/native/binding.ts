/**
 * The only access to the native addon: it loads the .node file, adds types, and checks the arguments once. No other
 * file imports the addon.
 *
 * Calls are coarse: there is no call per page, and no guest byte enters JavaScript. u64 values are bigint; counts that
 * fit are numbers. `onEdge` means that something has changed and the caller should read the snapshot. Edges coalesce,
 * and a slow reader loses nothing. Handles are closed explicitly. Closing twice, during a transfer, or never (process
 * exit) is safe. A failure throws a MigrationError whose code comes from NATIVE_ERROR.
 */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { MigrationError } from '../domain/errors.js';
import type { Addon } from './addon.js';
import { attempt, attemptAsync } from './attempt.js';
import {
  checkBandwidth,
  checkCredentials,
  checkDigestsOptions,
  checkEdge,
  checkFetchOptions,
  checkImageOptions,
  checkPath,
  checkPlace,
  checkProbe,
  checkProvider,
  checkRegion,
  checkRegions,
  checkSnapshot,
  checkSocketPath,
  checkSourceClone,
  checkTargetOptions,
  checkTimeout,
  checkTracked,
} from './check.js';
import { checkChunkRequest, checkTags } from './chunks.js';
import { ImageDigests } from './digests.js';
import { DataListener, ImageCapture, ImageFetch, imageOf, SourceSession, TargetSession, VmMemory } from './handles.js';
import { checkGroup, checkSender, MulticastSender, Pacer, sendProbes } from './multicast.js';
import type { NativeBinding } from './types.js';

export { failureToError } from './failure.js';

/** The variable for the path of another build of the addon, for tests with a sanitizer. */
const ADDON_PATH_VARIABLE = 'VMIGRATE_ADDON';

/** The path is the same from src/native and from dist/native. */
const ADDON_PATH = '../../build/native/Release/vmigrate.node';

function loadAddon(): Addon {
  const path = process.env[ADDON_PATH_VARIABLE] ?? fileURLToPath(new URL(ADDON_PATH, import.meta.url));
  try {
    return createRequire(import.meta.url)(path) as Addon;
  } catch (cause) {
    throw new MigrationError('UNSUPPORTED', `the native addon cannot be loaded from ${path}`, {
      remedy: 'build it with: npm run build:native',
      cause,
    });
  }
}

function bind(addon: Addon): NativeBinding {
  return {
    support: () => attempt('userfaultfd', () => addon.support()),
    createRegionFile(region, at = region.path) {
      checkRegion(region);
      checkPath(at, 'region path');
      attempt(`create region file ${region.path}`, () => addon.createRegionFile({ ...region, path: at }));
    },
    allocatedBytes(path) {
      checkPath(path, 'path');
      return attempt(`region file ${path}`, () => addon.allocatedBytes(path));
    },
    lockFile(descriptor) {
      if (!Number.isInteger(descriptor) || descriptor < 0) {
        throw new MigrationError('USAGE', 'native argument: descriptor must be an open file');
      }
      return attempt('lock a file', () => addon.lockFile(descriptor));
    },
    peerUser(descriptor) {
      if (!Number.isInteger(descriptor) || descriptor < 0) {
        throw new MigrationError('USAGE', 'native argument: descriptor must be an open socket');
      }
      return attempt('the peer of a socket', () => addon.peerUser(descriptor));
    },
    listenForVm(options) {
      checkSocketPath(options.socketPath, 'socketPath');
      checkRegions(options.regions);
      checkEdge(options.onEdge);
      const { isIncoming, peerUid = 0 } = options;
      if (typeof isIncoming !== 'boolean') {
        throw new MigrationError('USAGE', 'native argument: isIncoming must be a boolean');
      }
      if (!Number.isInteger(peerUid) || peerUid < 0 || peerUid > 0x7fff_fffe)
        throw new MigrationError('USAGE', 'native argument: peerUid must be a user');
      return attempt(`listen on ${options.socketPath}`, () => new VmMemory(addon.listenForVm(options)));
    },
    adoptVm(options) {
      checkSnapshot(options.snapshot);
      checkRegions(options.regions);
      if (options.onEdge !== undefined) checkEdge(options.onEdge);
      return attempt(`take back VM process ${options.snapshot.pid}`, () => new VmMemory(addon.adoptVm(options)));
    },
    async devices(provider) {
      return attemptAsync('devices of this host', () => addon.devices(provider));
    },
    async probe(peer, timeoutMs) {
      checkProbe(peer, timeoutMs);
      await attemptAsync(`connect to ${peer.host}`, () => addon.probe(peer, timeoutMs));
    },
    openDataListener(options) {
      for (const place of options.listen) checkPlace(place);
      const where = options.listen.map(({ host, port }) => (host.startsWith('/') ? host : `${host} port ${port}`));
      return attempt(
        `listen for data on ${where.join(' and ')}`,
        () => new DataListener(addon.openDataListener(options)),
      );
    },
    async openSourceSession(options) {
      checkProvider(options.provider);
      checkCredentials(options);
      checkRegions(options.regions);
      checkSourceClone(options);
      checkTracked(options);
      const listener = DataListener.nativeOf(options.listener);
      const vm = options.clone?.vm ?? null;
      const clone = vm === null ? null : VmMemory.nativeOf(vm);
      const image = options.image === undefined ? null : imageOf(options.image);
      const tracked = options.tracked === undefined ? null : VmMemory.nativeOf(options.tracked);
      const open = (): ReturnType<Addon['openSourceSession']> =>
        addon.openSourceSession(listener, options, clone, image, tracked);
      return new SourceSession(await attemptAsync('open source session', open));
    },
    openTargetSession(vm, options) {
      checkTargetOptions(options);
      if (options.tags !== undefined) checkTags(options.tags, options.regions.length);
      const memory = VmMemory.nativeOf(vm);
      return attempt('open target session', () => new TargetSession(addon.openTargetSession(memory, options)));
    },
    async digestArrived(region, request) {
      checkPath(region.tagPath, 'path of tags');
      checkChunkRequest(request);
      return attemptAsync('digest the memory that has arrived', () => addon.digestArrived(region, request));
    },
    openImageCapture(options) {
      checkImageOptions(options);
      const parent = options.parent === null ? null : VmMemory.nativeOf(options.parent);
      return attempt('open image capture', () => new ImageCapture(addon.openImageCapture(parent, options)));
    },
    openImageFetch(options) {
      checkFetchOptions(options);
      const digests = options.digests === null ? null : ImageDigests.nativeOf(options.digests);
      return attempt('open image fetch', () => new ImageFetch(addon.openImageFetch(options, digests)));
    },
    openImageDigests(options) {
      checkDigestsOptions(options);
      return attempt('open digests of an image', () => new ImageDigests(addon.openImageDigests(options)));
    },
    async openMulticastSender(options) {
      checkSender(options);
      const doing = `send an image to ${options.group.group}`;
      return new MulticastSender(await attemptAsync(doing, () => addon.openMulticastSender(options)));
    },
    sendMulticastProbe: (group, durationMs, stop) => sendProbes(addon, group, durationMs, stop),
    async receiveMulticastProbe(group, timeoutMs) {
      checkGroup(group);
      checkTimeout(timeoutMs);
      const doing = `receive probes of ${group.group}`;
      return { largestBytes: await attemptAsync(doing, () => addon.receiveMulticastProbe(group, timeoutMs)) };
    },
    openPacer(options) {
      checkBandwidth(options.bandwidthBytesPerS);
      return new Pacer(addon.openPacer(options));
    },
    async releaseVm(vm) {
      const memory = VmMemory.nativeOf(vm);
      await attemptAsync('release VM memory', () => addon.releaseVm(memory));
    },
    async releaseTracked(vm) {
      const memory = VmMemory.nativeOf(vm);
      await attemptAsync('end the tracking of writes', () => addon.releaseTracked(memory));
    },
  };
}

let binding: NativeBinding | undefined;

/** Loads the addon on first use. Throws UNSUPPORTED if it is not built. */
export function loadNativeBinding(): NativeBinding {
  binding ??= bind(loadAddon());
  return binding;
}

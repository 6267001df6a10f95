/** This host's part in RDMA: the address that it chooses, when it opens a new listener, and its answer without RDMA. */
import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../../src/domain/errors.js';
import type { RdmaDevice } from '../../../../src/domain/transport.js';
import type { DataListenerHandle, Place } from '../../../../src/native/types.js';
import { RdmaHost, type RdmaHostOptions } from '../../../../src/transports/rdma/host.js';

const silent = () => undefined;

function device(addresses: readonly string[], isActive = true): RdmaDevice {
  const port = { number: 1, isActive, state: isActive ? 'active' : 'down', linkLayer: 'Ethernet', mtuBytes: 1024 };
  return { name: 'rv1', isOnDemandPaging: false, ports: [{ ...port, gids: [], addresses: isActive ? addresses : [] }] };
}

class Listener {
  isLost = false;
  isInUse = false;
  isClosed = false;

  constructor(
    readonly host: string,
    readonly port: number,
  ) {}

  address(provider: string): Place | null {
    return provider === 'verbs' ? { host: this.host, port: this.port } : null;
  }

  close(): void {
    if (this.isInUse) throw new MigrationError('CONFLICT', 'in use');
    this.isClosed = true;
  }
}

class Scene {
  devices: RdmaDevice[] | MigrationError = [];
  readonly listeners: Listener[] = [];
  probed: unknown = null;
  probeError: MigrationError | null = null;

  host(address: string | null = null): RdmaHost {
    const native: RdmaHostOptions['native'] = {
      devices: async () => {
        if (this.devices instanceof MigrationError) throw this.devices;
        return this.devices;
      },
      probe: async (peer) => {
        this.probed = peer;
        if (this.probeError !== null) throw this.probeError;
      },
      openDataListener: ({ listen: [place] }) => {
        if (place?.provider !== 'verbs') throw new Error('only RDMA is listened for here');
        const listener = new Listener(place.host, place.port === 0 ? 999 : place.port);
        this.listeners.push(listener);
        return listener satisfies DataListenerHandle;
      },
    };
    const config = { address, port: 7401, ackTimeoutExponent: 18, retryCount: 7 };
    return new RdmaHost({
      native,
      config,
      dataAddress: '10.0.0.1',
      log: { info: silent, warn: silent, error: silent },
    });
  }
}

describe('the address', () => {
  test('is the data address if it leads to a port, else the first one that does', async () => {
    const scene = new Scene();
    scene.devices = [device(['10.1.0.1', '10.0.0.1'])];
    expect(await scene.host().inventory()).toMatchObject({ problem: null, address: '10.0.0.1', port: 7401 });
    scene.devices = [device(['10.2.0.1'], false), device(['10.1.0.1'])];
    expect(await scene.host().inventory()).toMatchObject({ address: '10.1.0.1' });
    expect(await scene.host().connection()).toEqual({
      localAddress: '10.1.0.1',
      ackTimeoutExponent: 18,
      retryCount: 7,
    });
  });

  test('that is configured is taken or nothing is', async () => {
    const scene = new Scene();
    scene.devices = [device(['10.0.0.1', '10.1.0.1'])];
    expect(await scene.host('10.1.0.1').inventory()).toMatchObject({ address: '10.1.0.1' });
    const { problem, address } = await scene.host('10.3.0.1').inventory();
    expect(address).toBeNull();
    expect(problem?.reason).toMatch(/10\.3\.0\.1 belongs to no active RDMA port/);
  });
});

describe('where there is none', () => {
  const missing = new MigrationError('UNSUPPORTED', 'install the package librdmacm1');
  test.each<[string, RdmaDevice[] | MigrationError, RegExp]>([
    ['library', missing, /librdmacm1/],
    ['device', [], /no RDMA device/],
    ['active port', [device(['10.0.0.1'], false)], /no.* active RDMA port/],
  ])('no %s: the inventory says so, sessions are refused, nothing listens', async (_, devices, reason) => {
    const scene = new Scene();
    scene.devices = devices;
    const host = scene.host();
    const { problem, address, port } = await host.inventory();
    expect(problem?.reason).toMatch(reason);
    expect(problem?.remedy).not.toBe('');
    expect({ address, port }).toEqual({ address: null, port: null });
    await expect(host.listener()).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    expect(await host.probe({ host: '10.0.0.2', port: 1 })).toMatchObject({ isReached: false });
    expect(scene.listeners).toEqual([]);
    host.close();
  });
});

test('a peer that answers is reached, one that does not is not, and the reason is told', async () => {
  const scene = new Scene();
  scene.devices = [device(['10.0.0.1'])];
  const host = scene.host();
  expect(await host.probe({ host: '10.0.0.2', port: 7 })).toEqual({ isReached: true });
  expect(scene.probed).toMatchObject({
    provider: 'verbs',
    host: '10.0.0.2',
    port: 7,
    options: { localAddress: '10.0.0.1' },
  });
  scene.probeError = new MigrationError('TIMEOUT', 'nobody there');
  expect(await host.probe({ host: '10.0.0.2', port: 7 })).toEqual({ isReached: false, reason: 'nobody there' });
});

describe('the listener', () => {
  test('is one for all sessions, also while its port is down', async () => {
    const scene = new Scene();
    scene.devices = [device(['10.0.0.1'])];
    const host = scene.host();
    const listener = await host.listener();
    await host.inventory();
    scene.devices = [device(['10.0.0.1'], false)];
    await host.inventory();
    scene.devices = [device(['10.0.0.1'])];
    expect(await host.listener()).toBe(listener);
    expect(scene.listeners).toHaveLength(1);
  });

  test('is opened anew when its device has gone, beside the old one as long as that has sessions', async () => {
    const scene = new Scene();
    scene.devices = [device(['10.0.0.1'])];
    const host = scene.host();
    await host.listener();
    const old = scene.listeners[0]!;
    old.isLost = true;
    old.isInUse = true;
    expect(await host.listener()).toMatchObject({ host: '10.0.0.1', port: 999 });
    expect(old.isClosed).toBe(false);
    old.isInUse = false;
    await host.listener();
    expect(old.isClosed).toBe(true);
    host.close();
    expect(scene.listeners.map(({ isClosed }) => isClosed)).toEqual([true, true]);
  });
});

/**
 * A transport's row decides what a host does with the transport. A fifth row needs no edit here, in the planner or in
 * the commands.
 */
import { Command } from 'commander';
import { describe, expect, test, vi } from 'vitest';
import { addTransportOptions, chosenTransport } from '../../../../src/cli/transport-options.js';
import type { DataPolicy } from '../../../../src/domain/data-security.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import type { Transport } from '../../../../src/domain/transport.js';
import { checkTransport, chooseTransport } from '../../../../src/planner/migration/transport.js';
import {
  type DeviceTransport,
  HostTransports,
  type SourcePlace,
  sharedPlaces,
} from '../../../../src/transports/host/host-transports.js';
import { TRANSPORT_TABLE, type TransportRow } from '../../../../src/transports/table.js';
import { FakeListener } from '../../../support/agent-fakes.js';
import { goodFacts, host, request } from '../../planner/planner-facts.js';

const FABRIC: TransportRow = {
  title: 'Fabric',
  provider: 'libfabric',
  isOneSided: true,
  registersMemory: true,
  sameMachineOnly: false,
  readsProcessMemory: false,
  protectsBytes: false,
  carriesBackendMoves: false,
  connectTimeoutMs: 9_000,
  autoRank: 2,
  help: 'over the fabric',
};
const FIVE = { ...TRANSPORT_TABLE, fabric: FABRIC };
const fabric = 'fabric' as Transport;

function hostWith(devices: Record<string, DeviceTransport> = {}): HostTransports {
  const listener = new FakeListener('tcp', { host: '10.0.0.1', port: 7400 });
  return new HostTransports({ host: 'A', listener, devices, table: FIVE });
}

describe('a fifth row', () => {
  test('is served by its own listener, told to peers, and connected with its own options and patience', async () => {
    const own = new FakeListener('libfabric', { host: '10.9.0.1', port: 7 });
    const transports = hostWith({
      fabric: { listener: async () => own, connection: async () => ({ domain: 'hfi1_0' }) },
    });
    const { provider, listener } = await transports.served('fabric');
    expect(provider).toBe('libfabric');
    expect(transports.place('fabric', listener)).toEqual({ host: '10.9.0.1', port: 7, dataSecurity: 'integrity' });
    expect(await transports.connection('fabric', '10.9.0.1')).toEqual({
      provider: 'libfabric',
      options: { domain: 'hfi1_0' },
      timeoutMs: 9_000,
    });
  });

  test('without devices is listened for beside the others', () => {
    const data = { address: '10.0.0.1', port: 7400 };
    expect(sharedPlaces(data, '/run/data.sock')).toEqual([
      { provider: 'tcp', host: '10.0.0.1', port: 7400 },
      { provider: 'shm', host: '/run/data.sock', port: 0 },
    ]);
    const quic = { ...FABRIC, provider: 'quic', registersMemory: false };
    const pipe = { ...quic, provider: 'pipe', sameMachineOnly: true };
    expect(sharedPlaces(data, '/run/data.sock', { ...TRANSPORT_TABLE, quic, pipe }).slice(2)).toEqual([
      { provider: 'quic', host: '10.0.0.1', port: 0 },
      { provider: 'pipe', host: '/run/data.sock.pipe', port: 0 },
    ]);
  });

  test('is chosen by rank, and refused where its columns say so', () => {
    const facts = goodFacts();
    expect(chooseTransport({ ...request, transport: 'auto' }, facts, FIVE).transport).toBe('fabric');
    expect(chooseTransport({ ...request, transport: 'auto' }, facts).transport).toBe('rdma');
    const between = { source: host('A'), target: host('B'), checks: facts.target.checks, vm: facts.vm };
    const reasons = (mode: typeof request.mode, row: TransportRow): string[] =>
      [...checkTransport(fabric, mode, between, { ...FIVE, fabric: row })].map(({ reason }) => reason);
    expect(reasons('postcopy', FABRIC)).toEqual([]);
    expect(reasons('native-precopy', FABRIC)).toEqual(["vmigrate does not run QEMU's own migration over Fabric"]);
    expect(reasons('postcopy', { ...FABRIC, sameMachineOnly: true })).toEqual([
      'Fabric needs both daemons on one machine; A and B are on different machines',
    ]);
  });

  test('has a flag with its help, which excludes the others', () => {
    const program = addTransportOptions(new Command().exitOverride(), undefined, FIVE);
    program.configureOutput({ writeErr: () => undefined });
    expect(program.helpInformation()).toMatch(/--fabric\s+over the fabric/);
    expect(chosenTransport(program.parse(['--fabric'], { from: 'user' }).opts(), FIVE)).toBe('fabric');
    const again = addTransportOptions(new Command().exitOverride(), undefined, FIVE);
    again.configureOutput({ writeErr: () => undefined });
    expect(() => again.parse(['--fabric', '--tcp'], { from: 'user' })).toThrow(/cannot be used with/);
  });
});

describe('a host', () => {
  test('serves by the shared listener what has no devices, and without options', async () => {
    const transports = hostWith();
    const { provider, listener } = await transports.served('tcp');
    expect(provider).toBe('tcp');
    expect(transports.place('tcp', listener)).toEqual({ host: '10.0.0.1', port: 7400, dataSecurity: 'integrity' });
    expect(await transports.connection('tcp', '10.0.0.1')).toEqual({ provider: 'tcp', options: {}, timeoutMs: 3_000 });
  });

  test('refuses what it does not listen for, and what nobody knows', async () => {
    const refused = expect.objectContaining({ code: 'UNSUPPORTED' });
    await expect(hostWith().served('shm')).rejects.toEqual(refused);
    await expect(hostWith().served('pigeon')).rejects.toEqual(refused);
    await expect(hostWith().connection('pigeon', '10.0.0.1')).rejects.toEqual(refused);
  });

  test('refuses the place of a peer that its transport cannot have', async () => {
    const refused = expect.objectContaining({ code: 'PEER_PROTOCOL' });
    await expect(hostWith().connection('tcp', '/run/source.sock')).rejects.toEqual(refused);
    await expect(hostWith().connection('shm', '10.0.0.1')).rejects.toEqual(refused);
  });

  test('has nobody wait where no memory is registered', async () => {
    const transports = hostWith();
    let begun = 0;
    const calls = Array.from({ length: 8 }, () => transports.registering('tcp', async () => ++begun));
    await Promise.all(calls);
    expect(begun).toBe(8);
  });
});

describe('the protection of a connection', () => {
  const credentials = { session: 'a'.repeat(32), token: 'b'.repeat(64) };
  const at = { transport: 'tcp', host: '10.0.0.2', port: 7401, keys: [] };
  const refused = new MigrationError('UNAUTHENTICATED', 'peer refused the hello');

  function hostThat(policy?: DataPolicy): HostTransports {
    const listener = new FakeListener('tcp', { host: '10.0.0.1', port: 7400 });
    return new HostTransports({ host: 'A', listener, devices: {}, ...(policy === undefined ? {} : { policy }) });
  }
  /** Connects, fails with the errors in turn, and returns what was asked for each time. */
  async function asked(transports: HostTransports, endpoint: SourcePlace, errors: Error[] = []): Promise<unknown[]> {
    const tried: unknown[] = [];
    const failing = transports.connecting(endpoint, credentials, async ({ dataSecurity, isOldHello }) => {
      tried.push(isOldHello === true ? 'old' : dataSecurity);
      const error = errors.shift();
      if (error !== undefined) throw error;
    });
    tried.push(
      await failing.then(
        () => 'connected',
        (error: MigrationError) => error.code,
      ),
    );
    return tried;
  }

  test('is that of the host that wants more', async () => {
    const none = hostThat({ dataSecurity: 'none', acceptOldHello: false });
    expect(await asked(none, { ...at, dataSecurity: 'none' })).toEqual(['none', 'connected']);
    expect(await asked(none, { ...at, dataSecurity: 'integrity' })).toEqual(['integrity', 'connected']);
    expect(await asked(hostThat(), { ...at, dataSecurity: 'none' })).toEqual(['integrity', 'connected']);
    expect(await asked(hostThat(), at)).toEqual(['integrity', 'connected']);
    expect(await asked(none, at), 'a host that takes older peers does not say').toEqual(['integrity', 'connected']);
  });

  test('is not given up for a source that refuses', async () => {
    expect(await asked(hostThat(), at, [refused])).toEqual(['integrity', 'UNAUTHENTICATED']);
    const old = hostThat({ dataSecurity: 'integrity', acceptOldHello: true });
    const told = { ...at, dataSecurity: 'integrity' as const };
    expect(await asked(old, told, [refused])).toEqual(['integrity', 'UNAUTHENTICATED']);
    const lost = new MigrationError('UNREACHABLE', 'no route');
    expect(await asked(old, at, [lost])).toEqual(['integrity', 'UNREACHABLE']);
  });

  test('is missing where the host takes older peers, and the source may be one', async () => {
    const old = hostThat({ dataSecurity: 'integrity', acceptOldHello: true });
    expect(await asked(old, at)).toEqual(['integrity', 'connected']);
    expect(await asked(old, at, [refused])).toEqual(['integrity', 'old', 'connected']);
    expect(await asked(old, at, [refused, refused])).toEqual(['integrity', 'old', 'UNAUTHENTICATED']);
  });

  test('is told to peers and to the source session', async () => {
    const none = hostThat({ dataSecurity: 'none', acceptOldHello: false });
    const served = await none.served('tcp');
    expect(served).toMatchObject({ dataSecurity: 'none', isOldHello: false });
    expect(none.place('tcp', served.listener)).toMatchObject({ dataSecurity: 'none' });
    const old = hostThat({ dataSecurity: 'integrity', acceptOldHello: true });
    expect(await old.served('tcp')).toMatchObject({ dataSecurity: 'integrity', isOldHello: true });
    expect(old.place('tcp', served.listener)).toEqual({ host: '10.0.0.1', port: 7400 });
  });
});

test('memory is registered for two sessions at a time; one that fails gives its place on', async () => {
  const transports = hostWith();
  const ends: (() => void)[] = [];
  const begun: number[] = [];
  const calls = [0, 1, 2, 3].map((index) =>
    transports.registering(
      begun.length % 2 === 0 ? 'rdma' : 'fabric',
      () =>
        new Promise<number>((resolve, reject) => {
          begun.push(index);
          ends.push(index === 0 ? () => reject(new Error('no room')) : () => resolve(index));
        }),
    ),
  );
  const failed = expect(calls[0]).rejects.toThrow('no room');
  await vi.waitFor(() => expect(begun).toEqual([0, 1]));
  ends[0]?.();
  await failed;
  await vi.waitFor(() => expect(begun).toEqual([0, 1, 2]));
  ends[1]?.();
  ends[2]?.();
  await vi.waitFor(() => expect(begun).toEqual([0, 1, 2, 3]));
  ends[3]?.();
  expect(await Promise.all(calls.slice(1))).toEqual([1, 2, 3]);
});

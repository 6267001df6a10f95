/**
 * What another host may call here. A certificate says which host calls; this table says what that host has to do with
 * the object of the call. The coordinator of a job is the daemon of its source or root, so no host ever makes a call
 * there for a job of this one. The compiler reports a call that is missing here.
 *
 * An object that is not known here is nobody's. Such a call gets the answer of the agent: NOT_FOUND, or success if the
 * call only undoes.
 */
import { MigrationError } from '../../domain/errors.js';
import type { VmIdentity } from '../../domain/host.js';
import type { HostPort, HostRole } from '../../engine/ports/host.js';
import type { HostTies } from '../contract/ports.js';

export interface PeerCall {
  /** The name in the caller's certificate. */
  readonly caller: string;
  /** This host. */
  readonly host: string;
  readonly ties: HostTies;
}

/** Returns why the caller may not make the call, or null if it may. */
type Right<Args extends readonly unknown[]> = (call: PeerCall, ...args: Args) => string | null;

interface Row<Args extends readonly unknown[]> {
  readonly right: Right<Args>;
  /** The call changes something, so that there is a line for it in the log. */
  readonly isChange: boolean;
}

type RowOf<Call> = Call extends (...args: infer Args) => Promise<unknown> ? Row<Args> : never;

type HostRights = {
  readonly [Role in HostRole]: { readonly [Name in keyof HostPort[Role]]: RowOf<HostPort[Role][Name]> };
};

const changes = <Args extends readonly unknown[]>(right: Right<Args>): Row<Args> => ({ right, isChange: true });
const reads = <Args extends readonly unknown[]>(right: Right<Args>): Row<Args> => ({ right, isChange: false });

const anyHost = (): null => null;
/** Only the coordinator makes the call, and it does so on its own host, without a connection. */
const nobody = ({ host }: PeerCall): string => `only ${host} itself makes this call`;

const ofSource = ({ caller, host, ties }: PeerCall, session: string): string | null => {
  const source = ties.sourceOf(session);
  return source === null || source === caller ? null : `the session is that of another host than ${caller} on ${host}`;
};

const ofRoot = ({ caller, host, ties }: PeerCall, fork: string): string | null => {
  const root = ties.rootOf(fork);
  return root === null || root === caller ? null : `${caller} is not the root of fork ${fork} on ${host}`;
};

const ofImage = ({ caller, host, ties }: PeerCall, image: string): string | null => {
  const hosts = ties.hostsOf(image);
  return hosts === null || hosts.includes(caller) ? null : `${host} does not share image ${image} with ${caller}`;
};

/** A host speaks for itself only. */
const ofReader = (call: PeerCall, image: string, reader: string): string | null =>
  reader === call.caller ? ofImage(call, image) : `${call.caller} cannot read an image as ${reader}`;

/** A host may always say that it reads an image no more. */
const ofItself = ({ caller }: PeerCall, _image: string, reader: string): string | null =>
  reader === caller ? null : `${caller} cannot speak for ${reader}`;

const HOST_RIGHTS: HostRights = {
  inventory: {
    inventory: reads(anyHost),
    vmInventory: reads(nobody),
    vmClaims: reads(anyHost),
    layerHolders: reads(anyHost),
    vmViews: reads(anyHost),
    checkTarget: reads(anyHost),
    offerStorage: changes(nobody),
    viewStorage: reads(anyHost),
    endStorage: changes(nobody),
  },

  source: {
    reserve: changes(nobody),
    unreserve: changes(nobody),
    expose: changes(nobody),
    unexpose: changes(nobody),
    noteDirty: changes(nobody),
    stop: changes(nobody),
    continueVm: changes(nobody),
    transferState: changes(nobody),
    nativeMigrate: changes(nobody),
    nativeProgress: reads(nobody),
    nativeRecover: changes(nobody),
    nativeCancel: changes(nobody),
    digestFrozen: reads(nobody),
    sourceCounters: reads(nobody),
    release: changes(nobody),
  },

  target: {
    prepare: changes((call, { session, source }) =>
      source === call.caller ? ofSource(call, session) : `${call.caller} cannot move a VM of ${source}`,
    ),
    connect: changes(ofSource),
    fetchAhead: changes(ofSource),
    takeBack: changes(ofSource),
    awaitLoaded: reads(ofSource),
    resume: changes(ofSource),
    progress: reads(ofSource),
    reconnect: changes(ofSource),
    inherit: changes(ofSource),
    digestArrived: reads(ofSource),
    condemn: changes(ofSource),
    finish: changes(ofSource),
    discard: changes(ofSource),
  },

  forks: {
    forkInventory: reads((call, { origin }) =>
      origin?.host === call.caller ? null : `${call.caller} can ask only about forks of its own`,
    ),
    prepareClones: changes((call, { fork, origin, vm }) => {
      // The VM is the root's. One of this host by that name is another.
      if (origin?.host !== call.caller || vm !== null) return `${call.caller} can fork only what it has itself`;
      // An image of this id that came from elsewhere is none of the caller's.
      return ofRoot(call, fork) ?? ofImage(call, origin.image);
    }),
    armParent: changes(nobody),
    forkPoint: changes(nobody),
    serveImage: changes(ofReader),
    imageDigests: reads(ofReader),
    endImage: changes(ofItself),
    connectImage: changes(ofRoot),
    completeImage: changes(ofImage),
    sendForkState: changes(nobody),
    loadClones: changes(ofRoot),
    commitFork: changes(nobody),
    runClones: changes(ofRoot),
    forkProgress: reads(ofRoot),
    finishFork: changes(ofRoot),
    // It also decides that a fork that is not known here is undone.
    forkDecision: changes((call, fork) => {
      const hosts = call.ties.joinedOf(fork);
      return hosts === null || hosts.includes(call.caller) ? null : `${call.caller} has not joined fork ${fork}`;
    }),
    discardFork: changes(ofRoot),
  },

  fanout: {
    heldDigests: reads(ofImage),
    digestsHash: reads(ofReader),
    serveHeld: changes(ofReader),
    joinMulticast: reads(ofReader),
    touchOrder: reads(ofReader),
    multicastSent: reads(nobody),
    probeMulticast: reads(nobody),
    roundTrips: reads(anyHost),
    echo: reads(anyHost),
    hearMulticast: reads(anyHost),
  },

  images: {
    imageViews: reads(anyHost),
    imageClones: reads(anyHost),
    // Each clone has a right of its own: `clonesOfOthers`.
    stopClones: changes(anyHost),
    removeImage: changes(ofImage),
  },
};

const ROWS = new Map(
  Object.values(HOST_RIGHTS).flatMap((rows) => Object.entries(rows as Record<string, Row<readonly unknown[]>>)),
);

/** `args` have been checked against the schema of the call. Throws NOT_PERMITTED. */
export function refuseWithoutRight(call: PeerCall, name: string, args: readonly unknown[]): void {
  const row = ROWS.get(name);
  refuse(row === undefined ? 'nobody may make this call' : row.right(call, ...args));
}

/** The device state of a session comes from its source, that of a fork from its root. */
export function refuseStateOfOthers(
  call: PeerCall,
  of: { readonly session: string } | { readonly fork: string },
): void {
  refuse('session' in of ? ofSource(call, of.session) : ofRoot(call, of.fork));
}

/** Only hosts that take part in a fork of the image read its disks, and what its clones print. */
export function refuseReaderOf(call: PeerCall, image: string): void {
  refuse(ofImage(call, image));
}

export function refuseLogOf(call: PeerCall, vm: string): void {
  const image = call.ties.imageOf(vm, null);
  // A clone that has moved has left its image, and nothing here says any more where it came from.
  if (image === undefined || image === null) return;
  refuse(ofImage(call, image));
}

export function isChange(name: string): boolean {
  return ROWS.get(name)?.isChange ?? true;
}

/** Returns those clones that the caller may not stop, each with the reason. A moved clone is no clone any more. */
export function clonesOfOthers(
  call: PeerCall,
  clones: readonly VmIdentity[],
): readonly { readonly name: string; readonly error: MigrationError }[] {
  return clones.flatMap(({ name, uuid }) => {
    const image = call.ties.imageOf(name, uuid);
    if (image === undefined) return [];
    const reason = image === null ? `${name} is no clone of a fork with ${call.caller}` : ofImage(call, image);
    return reason === null ? [] : [{ name, error: new MigrationError('NOT_PERMITTED', reason) }];
  });
}

function refuse(reason: string | null): void {
  if (reason !== null) throw new MigrationError('NOT_PERMITTED', reason);
}

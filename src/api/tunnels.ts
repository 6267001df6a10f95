/**
 * Serves tunnels to other hosts (src/api/peers/tunnel.ts). Only hosts that this one knows get one, by the name in their
 * certificate, and each kind of tunnel says what the host must have to do with its object.
 */
import type { IncomingMessage } from 'node:http';
import type { Duplex } from 'node:stream';
import { TLSSocket } from 'node:tls';
import { type Caller, hostNameOf } from '../domain/caller.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { DISK_TUNNELS_MAX, STREAM_TUNNELS_MAX } from '../domain/host.js';
import { joinStreams } from '../kit/join-streams.js';
import { authorize } from './access.js';
import { refuse } from './console.js';
import type { ApiAgent, ApiServices } from './contract/ports.js';
import { type PeerCall, refuseReaderOf, refuseStateOfOthers } from './peers/peer-rights.js';
import { diskEnd, KEEP_ALIVE_MS, streamEnd, type TunnelEnd } from './peers/tunnel.js';

interface Kind {
  readonly path: RegExp;
  readonly protocol: string;
  /** The name in the audit log. */
  readonly call: string;
  /** At once, of all hosts together. */
  readonly countMax: number;
  /** Throws NOT_PERMITTED. `ids` are those in the path. */
  refuse(call: PeerCall, ids: readonly string[]): void;
  open(agent: ApiAgent, ids: readonly string[], caller: string): Promise<Duplex>;
}

const IMAGE = '([0-9a-f]{16})';
const DISK = '([a-z][a-z0-9-]{0,31})';
const SESSION = '([0-9a-f]{32})';

const KINDS: readonly Kind[] = [
  {
    // It leads to a process of the back end that has no key, and no socket that others can reach.
    ...served(diskEnd(IMAGE, DISK)),
    call: 'openDisk',
    countMax: DISK_TUNNELS_MAX,
    refuse: (call, [image = '']) => refuseReaderOf(call, image),
    open: ({ forks }, [image = '', disk = ''], caller) => forks.openDisk(image, disk, caller),
  },
  {
    // It leads to the one QEMU that waits for this session.
    ...served(streamEnd(SESSION)),
    call: 'openStream',
    countMax: STREAM_TUNNELS_MAX,
    refuse: (call, [session = '']) => refuseStateOfOthers(call, { session }),
    open: ({ target }, [session = '']) => target.openStream(session),
  },
];

function served({ path, protocol }: TunnelEnd): Pick<Kind, 'path' | 'protocol'> {
  return { path: new RegExp(`^${path}$`), protocol };
}

export class Tunnels {
  private readonly open = new Map<Duplex, Kind>();

  constructor(private readonly services: ApiServices) {}

  /** True if the request is for a tunnel. Then `handle` owns the socket. */
  static isFor({ url }: IncomingMessage): boolean {
    return KINDS.some(({ path }) => path.test(url ?? ''));
  }

  /** `onOpen` is called when the connection is a tunnel, and carries no more requests. */
  handle(request: IncomingMessage, socket: Duplex, head: Buffer, onOpen: () => void): void {
    socket.on('error', () => socket.destroy());
    this.attach(request, socket, { head, onOpen }).catch((error: unknown) => refuse(socket, error));
  }

  close(): void {
    for (const socket of this.open.keys()) socket.destroy();
  }

  /** Returns the host that calls. Throws if it is none, or none that has the right. */
  private authorize(request: IncomingMessage, kind: Kind, ids: readonly string[]): string {
    const { host, agent, audit } = this.services;
    let known: Caller | null = null;
    try {
      const caller = authorize(request, 'host', this.services, (each) => {
        known = each;
      });
      const name = hostNameOf(caller) ?? '';
      kind.refuse({ caller: name, host, ties: agent.ties }, ids);
      return name;
    } catch (error) {
      const { code, message } = toMigrationError(error);
      const { name: who, from } = known ?? { name: 'unknown', from: request.socket.remoteAddress ?? '' };
      audit.note({ who, from, what: kind.call, object: ids[0] ?? '', result: code, message });
      throw error;
    }
  }

  private async attach(
    request: IncomingMessage,
    socket: Duplex,
    { head, onOpen }: { head: Buffer; onOpen: () => void },
  ): Promise<void> {
    const { services } = this;
    const { kind, ids } = kindOf(request);
    const caller = this.authorize(request, kind, ids);
    const isUpgrade = request.method === 'GET' && request.headers.upgrade?.toLowerCase() === kind.protocol;
    if (!isUpgrade) throw new MigrationError('NOT_FOUND', 'this address does not support that upgrade');
    const count = [...this.open.values()].filter((each) => each === kind).length;
    if (count >= kind.countMax)
      throw new MigrationError('CONFLICT', `${count} connections of this kind are open`, { isRetryable: true });
    this.open.set(socket, kind);
    socket.once('close', () => this.open.delete(socket));
    const remote = await kind.open(services.agent, ids, caller);
    services.audit.note({
      ...{ who: `host/${caller}`, from: request.socket.remoteAddress ?? '' },
      ...{ what: kind.call, object: ids[0] ?? '', result: 'ok' },
    });
    if (socket.destroyed) return void remote.destroy();
    onOpen();
    if (request.socket instanceof TLSSocket) request.socket.setKeepAlive(true, KEEP_ALIVE_MS);
    socket.write(`HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${kind.protocol}\r\n\r\n`);
    if (head.length > 0) remote.write(head);
    joinStreams(socket, remote);
  }
}

function kindOf({ url = '' }: IncomingMessage): { kind: Kind; ids: readonly string[] } {
  for (const kind of KINDS) {
    const match = kind.path.exec(url);
    if (match !== null) return { kind, ids: match.slice(1) };
  }
  throw new MigrationError('NOT_FOUND', 'there is no tunnel at this address');
}

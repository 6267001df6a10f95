/**
 * Finds what a spec's own arguments take of the host that only one process can have: ports it listens on, sockets,
 * files that it writes, devices. Clones of the VM would want the same. Pure.
 */
import type { HostResource } from '../../domain/host-resource.js';
import type { VmSpec } from '../../domain/vm.js';
import { type Argument, argumentsIn, isOn, type Options, optionsIn } from './options.js';

type Finding = Omit<HostResource, 'argument'>;

const port = (what: string): Finding => ({ what, isOfNetwork: true });
const thing = (what: string): Finding => ({ what, isOfNetwork: false });

export function hostResources({ devices, qemuArgs }: Pick<VmSpec, 'devices' | 'qemuArgs'>): HostResource[] {
  const all = [
    ...argumentsIn(qemuArgs),
    ...devices.map((value) => ({ option: 'device', value, text: `devices: ${value}` })),
  ];
  return all.flatMap((argument) => [...findings(argument)].map((found) => ({ argument: argument.text, ...found })));
}

function findings({ option, value }: Argument): Iterable<Finding> {
  const options = optionsIn(value);
  switch (option) {
    case 'netdev':
    case 'nic':
    case 'net':
      return network(options);
    case 'chardev':
      return chardev(options);
    case 'vnc':
      return vnc(value);
    case 'display':
      return options.keys.has('vnc') ? vnc(options.keys.get('vnc') ?? '') : [];
    case 'spice':
      return spice(options);
    case 's':
      return [port('TCP port 1234')];
    case 'device':
      return device(options);
    case 'D':
      return [thing(`the file ${value}`)];
    case 'qmp':
    case 'qmp-pretty':
    case 'monitor':
    case 'serial':
    case 'parallel':
    case 'debugcon':
    case 'gdb':
      return legacyChardev(value);
    default:
      return [];
  }
}

function* network({ head, keys, pairs }: Options): Iterable<Finding> {
  const kind = head === '' ? (keys.get('type') ?? '') : head;
  // In JSON the forwarded ports are a list of objects (hostfwd.0.str).
  for (const [key, value] of pairs) {
    if (!/^hostfwd(\.|$)/.test(key)) continue;
    // PROTOCOL:ADDRESS:PORT-GUEST. Port 0 lets the kernel choose.
    const [, hostPort] = /:(\d+)-/.exec(value) ?? [];
    if (hostPort !== '0') yield port(`the forwarded port ${value}`);
  }
  if (kind === 'socket' && keys.has('listen')) yield port(`the port ${keys.get('listen') ?? ''}`);
  if ((kind === 'stream' || kind === 'dgram') && (isOn(keys.get('server')) || keys.has('local.type')))
    yield keys.has('addr.path') || keys.has('local.path') ? thing('a unix socket') : port('a port');
  const tap = keys.get('ifname');
  if (kind === 'tap' && tap !== undefined && !tap.includes('%')) yield port(`the tap ${tap}`);
}

function* chardev({ head, keys }: Options): Iterable<Finding> {
  const kind = head === '' ? (keys.get('backend.type') ?? keys.get('backend') ?? '') : head;
  const path = keys.get('path');
  const isServer = isOn(keys.get('server'));
  if (kind === 'socket' && isServer) {
    if (path !== undefined) yield thing(`the socket ${path}`);
    else if (keys.get('port') !== '0' || keys.has('to'))
      yield* keys.has('to') ? [] : [port(`port ${keys.get('port') ?? ''}`)];
  }
  if (kind === 'udp' && keys.has('localport') && keys.get('localport') !== '0')
    yield port(`UDP port ${keys.get('localport') ?? ''}`);
  if (/^(file|pipe|serial|tty|parallel|parport)$/.test(kind) && path !== undefined && path !== '/dev/null')
    yield thing(`the file ${path}`);
  const log = keys.get('logfile');
  if (log !== undefined) yield thing(`the file ${log}`);
}

/** "none" listens nowhere, `to=` takes the next free port, `reverse` connects. */
function* vnc(value: string): Iterable<Finding> {
  const { head, keys } = optionsIn(value);
  if (head === '' || head === 'none' || isOn(keys.get('reverse'))) return;
  if (head.startsWith('unix:')) yield thing(`the socket ${head.slice('unix:'.length)}`);
  else if (!keys.has('to')) yield port(`the VNC display ${head}`);
}

function* spice({ keys }: Options): Iterable<Finding> {
  if (isOn(keys.get('unix'))) yield thing(`the socket ${keys.get('addr') ?? ''}`);
  for (const key of ['port', 'tls-port']) {
    const value = keys.get(key);
    if (value !== undefined && !isOn(keys.get('unix'))) yield port(`the SPICE port ${value}`);
  }
}

function* device({ head, keys }: Options): Iterable<Finding> {
  const driver = head === '' ? (keys.get('driver') ?? '') : head;
  const contextId = keys.get('guest-cid');
  if (/^(vhost-)?vsock|vhost-vsock/.test(driver) && contextId !== undefined) yield thing(`the vsock CID ${contextId}`);
}

/** `tcp:…,server`, `unix:PATH,server`, `telnet:…,server`, `file:PATH`, `pipe:PATH`, `udp::…@:PORT`, or a device. */
function* legacyChardev(value: string): Iterable<Finding> {
  const { head, keys } = optionsIn(value);
  const [, kind = '', rest = ''] = /^([a-z]+):(.*)$/.exec(head) ?? [];
  const isServer = isOn(keys.get('server'));
  if (/^(tcp|telnet|websocket)$/.test(kind) && isServer) yield port(`the port ${rest}`);
  else if (kind === 'unix' && isServer) yield thing(`the socket ${rest}`);
  else if (kind === 'udp' && rest.includes('@')) yield port(`the port ${rest.slice(rest.indexOf('@') + 1)}`);
  else if (kind === 'file' || kind === 'pipe') yield thing(`the file ${rest}`);
  else if (head.startsWith('/dev/') && head !== '/dev/null') yield thing(head);
}

import { type HostState, PAGES, type World } from './world.js';

/** Transfer time of one page. */
export const PAGE_MS = 4;

/** QEMU's own migration. Its stream goes through both daemons, and breaks when one of them dies. */
export function moveNatively(
  world: World,
  source: HostState,
  vm: string,
  session: string,
): { outcome: 'moved' | 'failed' | null } {
  const moving = { outcome: null as 'moved' | 'failed' | null };
  const record = source.vms.get(vm);
  const qemu = record?.qemu;
  const memory = record?.memory;
  if (!qemu || !memory) return { outcome: 'failed' };
  const other = source === world.hosts.A ? world.hosts.B : world.hosts.A;
  world.nativeCancelled.delete(session);
  const ways = [source.life, other.life];
  const move = (left: number): void => {
    const noted = other.sessions.get(session);
    const target = noted === undefined ? undefined : other.vms.get(noted.vm);
    const isBroken =
      world.nativeCancelled.has(session) ||
      !world.isNetworkUp ||
      source.life !== ways[0] ||
      other.life !== ways[1] ||
      !qemu.isAlive ||
      target?.qemu?.isAlive !== true;
    world.event('QEMU moves pages');
    if (isBroken || !target?.qemu || target.memory === null) {
      moving.outcome = 'failed';
    } else if (left > 0) {
      world.time.after(PAGE_MS, () => move(left - 1));
    } else {
      qemu.state = 'paused';
      target.memory.pages.splice(0, PAGES, ...memory.pages);
      target.qemu.version = qemu.version;
      target.qemu.state = 'loaded';
      target.loadedVersion = qemu.version;
      moving.outcome = 'moved';
    }
  };
  move(3);
  return moving;
}

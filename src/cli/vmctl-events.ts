/** `vmctl events`: what has happened to the VMs of a host, and what happens next. */
import type { Command } from 'commander';
import { type ApiClient, DaemonUnreachable } from '../api/client.js';
import type { VmEvent } from '../domain/vm-event.js';
import { type CommonOptions, client } from './program.js';
import { plain, table } from './render.js';
import { print } from './terminal.js';

interface EventsOptions extends CommonOptions {
  readonly follow?: boolean;
  readonly after?: string;
}

/** How often a daemon that is away is asked again, and for how long. */
const RECONNECT = { everyMs: 500, forMs: 15_000 };

export function addEvents(program: Command): void {
  program
    .command('events')
    .description('list what has happened to the VMs on the host, oldest first: the last 1024 events')
    .option('--follow', 'go on with what happens from now on, one event a line (with --json: one document a line)')
    .option('--after <id>', 'only what has happened after this event')
    .action(async (_: unknown, command: Command) => {
      const options = command.optsWithGlobals<EventsOptions>();
      const { after } = options;
      if (options.follow === true) return follow(client(options), after, options.json === true);
      const query = after === undefined ? '' : `?after=${encodeURIComponent(after)}`;
      const events = await client(options).get<VmEvent[]>(`/v1/events/vms${query}`);
      print({ isJson: options.json === true }, events, eventTable);
    });
}

/** Goes on until it is interrupted. Throws DaemonUnreachable if the daemon does not come back within a while. */
export async function follow(
  api: Pick<ApiClient, 'followVms'>,
  after: string | undefined,
  isJson: boolean,
  { everyMs, forMs } = RECONNECT,
): Promise<void> {
  let last = after;
  let awayAtMs: number | null = null;
  const show = (event: VmEvent): void => {
    last = event.id;
    const { at, vm } = event;
    process.stdout.write(isJson ? `${JSON.stringify(event)}\n` : `${plain(`${at}  ${vm}  ${eventText(event)}`)}\n`);
  };
  const onOpen = (): void => {
    awayAtMs = null;
  };
  for (;;) {
    try {
      await api.followVms(last, show, { onOpen });
      awayAtMs ??= performance.now();
    } catch (error) {
      awayAtMs ??= performance.now();
      if (!(error instanceof DaemonUnreachable) || performance.now() - awayAtMs > forMs) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, everyMs));
  }
}

export function eventTable(events: readonly VmEvent[]): string {
  return table(
    ['TIME', 'VM', 'EVENT', 'JOB', 'ID'],
    events.map((event) => [event.at, event.vm, eventText(event), event.job ?? '-', event.id]),
  );
}

export function eventText({ kind, peer, exit }: VmEvent): string {
  const other = peer ?? 'another host';
  switch (kind) {
    case 'found':
      return 'found by a new daemon';
    case 'stopped':
      if (exit === null) return 'stopped';
      return `stopped: ${exit.reason}${exit.exitCode === null ? '' : ` (exit code ${exit.exitCode})`}`;
    case 'arriving':
      return `arriving from ${other}`;
    case 'arrived':
      return `runs here, while its memory comes from ${other}`;
    case 'complete':
      return 'all of its memory is here';
    case 'leaving':
      return `leaving for ${other}`;
    case 'stayed':
      return `not moved to ${other}: it is still here`;
    case 'left':
      return `runs on ${other}`;
    case 'gone':
      return 'nothing of it is left on this host';
    default:
      return kind;
  }
}

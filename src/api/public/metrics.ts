/**
 * The daemon's metrics in Prometheus's text format. Each metric is a row of one table. Counters come from the job
 * reports since the daemon started, gauges from the current state. Gauges are computed on request only.
 */

import { IMAGE_STATES } from '../../domain/image.js';
import { isEnded, JOB_STATES, type JobView } from '../../domain/job.js';
import { VM_STATES, type VmView } from '../../domain/vm.js';
import type { ApiServices } from '../contract/ports.js';

export const METRICS_CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8';

const FANOUT_BYTES = ['multicast', 'repair', 'relayed'] as const;
const BYTE_KINDS = ['push', 'demand', 'prefetch', 'zeroSkipped', 'deviceState'] as const;

type Samples = readonly (readonly [labels: string, value: number])[];

interface Metric {
  readonly name: string;
  readonly type: 'counter' | 'gauge';
  readonly help: string;
  readonly samples: () => Samples;
}

/** The coordinator of a job counts it, and no other host. */
function isOwn({ coordinator }: JobView): boolean {
  return coordinator === undefined;
}

/** The VMs that run here and lack memory. Their names, and those of hosts, need no escaping in labels. */
function incomplete(vms: readonly VmView[]) {
  return vms.flatMap(({ name, arriving }) => {
    if (arriving === undefined || arriving.incompleteSince === null) return [];
    const seconds = Math.max(0, (Date.now() - Date.parse(arriving.incompleteSince)) / 1000);
    return [{ labels: `{vm="${name}",source="${arriving.source}"}`, seconds, isStalled: arriving.isStalled }];
  });
}

export class Metrics {
  private readonly totals = new Map<string, number>();
  private readonly counted = new Set<string>();
  private readonly table: readonly Metric[];
  private readonly unsubscribe: () => void;

  /** `refusedCount`: how many connections have been refused before their first request. */
  constructor(
    { jobs, vms, images, pool }: Pick<ApiServices, 'jobs' | 'vms' | 'images' | 'pool'>,
    refusedCount: () => number,
  ) {
    const total = (name: string) => this.totals.get(name) ?? 0;
    this.table = [
      {
        name: 'vmigrate_connections_refused_total',
        type: 'counter',
        help: 'Connections to the API that were refused before their first request.',
        samples: () => [['', refusedCount()]],
      },
      {
        name: 'vmigrate_jobs_ended_total',
        type: 'counter',
        help: 'Ended migrations and forks that this daemon coordinated, by outcome.',
        samples: () => JOB_STATES.filter(isEnded).map((state) => [`{state="${state}"}`, total(`ended.${state}`)]),
      },
      {
        name: 'vmigrate_jobs',
        type: 'gauge',
        help: 'Jobs that this daemon coordinates, by state.',
        samples: () => {
          const list = jobs.list().filter(isOwn);
          return JOB_STATES.map((state) => [`{state="${state}"}`, list.filter((job) => job.state === state).length]);
        },
      },
      {
        name: 'vmigrate_vms',
        type: 'gauge',
        help: 'VMs on this host, by state; incoming and departed are the two ends of a session.',
        samples: () => {
          const list = vms.list();
          return VM_STATES.map((state) => [`{state="${state}"}`, list.filter((vm) => vm.state === state).length]);
        },
      },
      {
        name: 'vmigrate_vm_incomplete_seconds',
        type: 'gauge',
        help: 'How long a VM has run on this host without all of its memory, as far as this daemon has seen.',
        samples: () => incomplete(vms.list()).map(({ labels, seconds }) => [labels, seconds]),
      },
      {
        name: 'vmigrate_vm_stalled',
        type: 'gauge',
        help: '1 for a VM on this host whose missing memory does not come at present.',
        samples: () => incomplete(vms.list()).map(({ labels, isStalled }) => [labels, isStalled ? 1 : 0]),
      },
      {
        name: 'vmigrate_bytes_total',
        type: 'counter',
        help: 'Bytes moved by finished migrations, by kind; zeroSkipped: known to be zero, never fetched.',
        samples: () => BYTE_KINDS.map((kind) => [`{kind="${kind}"}`, total(`bytes.${kind}`)]),
      },
      {
        name: 'vmigrate_faults_total',
        type: 'counter',
        help: 'Page faults of guests served over the network.',
        samples: () => [['', total('faults')]],
      },
      {
        name: 'vmigrate_reconnects_total',
        type: 'counter',
        help: 'Data connections that were lost and re-established.',
        samples: () => [['', total('reconnects')]],
      },
      {
        name: 'vmigrate_blackout_seconds_total',
        type: 'counter',
        help: 'Time in which no vCPU ran, summed over finished migrations.',
        samples: () => [['', total('blackoutMs') / 1000]],
      },
      {
        name: 'vmigrate_clones_total',
        type: 'counter',
        help: 'Clones that finished forks have started.',
        samples: () => [['', total('clones')]],
      },
      {
        name: 'vmigrate_fork_pause_seconds_total',
        type: 'counter',
        help: 'Time in which parents were stopped, summed over finished forks.',
        samples: () => [['', total('parentPauseMs') / 1000]],
      },
      {
        name: 'vmigrate_fork_copied_bytes_total',
        type: 'counter',
        help: 'Bytes copied from parents into images by finished forks.',
        samples: () => [['', total('copied')]],
      },
      {
        name: 'vmigrate_fork_sent_bytes_total',
        type: 'counter',
        help: 'Bytes of images and device states that other hosts have read in finished forks.',
        samples: () => [['', total('sent')]],
      },
      {
        name: 'vmigrate_fork_fanout_bytes_total',
        type: 'counter',
        help: 'Bytes of images in finished forks: multicast: sent once to all hosts; repair, relayed: between hosts.',
        samples: () => FANOUT_BYTES.map((kind) => [`{kind="${kind}"}`, total(`fanout.${kind}`)]),
      },
      {
        name: 'vmigrate_fork_faults_total',
        type: 'counter',
        help: 'Page faults of finished forks: parents wait for the copy of a page, clones for a page of the image.',
        samples: () => [
          ['{side="parent"}', total('faults.parent')],
          ['{side="clones"}', total('faults.clones')],
        ],
      },
      {
        name: 'vmigrate_images',
        type: 'gauge',
        help: 'Images on this host, by state.',
        samples: () => {
          const list = images.list();
          return IMAGE_STATES.map((state) => [
            `{state="${state}"}`,
            list.filter((image) => image.state === state).length,
          ]);
        },
      },
      {
        name: 'vmigrate_image_bytes',
        type: 'gauge',
        help: 'Memory that images take on this host.',
        samples: () => [['', images.list().reduce((sum, { allocatedBytes }) => sum + allocatedBytes, 0)]],
      },
      {
        name: 'vmigrate_pool_processes',
        type: 'gauge',
        help: 'QEMU processes that wait for forks.',
        samples: () => [['', pool.list().reduce((sum, { readyCount }) => sum + readyCount, 0)]],
      },
      {
        name: 'process_resident_memory_bytes',
        type: 'gauge',
        help: 'Resident memory of the daemon.',
        samples: () => [['', process.memoryUsage.rss()]],
      },
    ];
    for (const job of jobs.list()) if (isOwn(job) && isEnded(job.state)) this.counted.add(job.id);
    this.unsubscribe = jobs.subscribe('*', (view) => this.count(view));
  }

  render(): string {
    return this.table
      .map(({ name, type, help, samples }) =>
        [
          `# HELP ${name} ${help}`,
          `# TYPE ${name} ${type}`,
          ...samples().map(([labels, value]) => `${name}${labels} ${value}`),
          '',
        ].join('\n'),
      )
      .join('');
  }

  close(): void {
    this.unsubscribe();
  }

  /** Counts a job that has ended. A recovered job is counted again when it ends again. */
  private count(view: JobView): void {
    if (!isOwn(view)) return;
    if (!isEnded(view.state)) {
      this.counted.delete(view.id);
      return;
    }
    if (this.counted.has(view.id)) return;
    this.counted.add(view.id);
    const add = (name: string, amount: number) => this.totals.set(name, (this.totals.get(name) ?? 0) + amount);
    add(`ended.${view.state}`, 1);
    if (view.report === null) return;
    if (view.kind === 'fork') {
      const { report } = view;
      add('clones', report.clones.length);
      add('parentPauseMs', report.parentPauseMs);
      add('copied', report.bytes.copied);
      add('sent', report.bytes.rootEgress);
      for (const kind of FANOUT_BYTES) add(`fanout.${kind}`, report.bytes[kind]);
      add('faults.parent', report.faults.parent);
      add('faults.clones', report.faults.clones);
    } else {
      const { report } = view;
      for (const kind of BYTE_KINDS) add(`bytes.${kind}`, report.bytes[kind]);
      add('faults', report.faults.count);
      add('reconnects', report.reconnects);
      add('blackoutMs', report.blackoutMs);
    }
  }
}

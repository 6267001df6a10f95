/**
 * `npm run -s bench -- scale`: how long an image takes to many hosts, in a model that decides by the planner's own code
 * and sends at the pace of the native one. Its numbers depend on nothing but the code. Writes docs/scale.svg, unless
 * `--quick` leaves out the large cases.
 */
import { writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { chooseFanout, type FanoutFacts } from '../src/planner/fanout/choose.js';
import { FANOUT_DEGREE } from '../src/planner/fanout/estimate.js';
import { relayTree } from '../src/planner/fanout/relay-tree.js';
import type { CaseOptions } from './lib/scale/case.js';
import { clusterOf, type Figures, quiet, SCALE_KINDS, type ScaleKind, simulate } from './lib/scale/model.js';
import { pacingOfAddon } from './lib/scale/native-pacing.js';
import type { Pacing } from './lib/scale/pacing.js';
import { plotScale, type ScaleResult, type ScaleRow } from './lib/scale/rows.js';

const GIB = 2 ** 30;
const IMAGE_BYTES = 4 * GIB;
/** 10 Gbit/s. */
const LINK_BYTES_PER_S = 1.25e9;
const SIZES = [16, 64, 256, 1024, 4096, 10_000];
const QUICK_SIZES = [16, 256];
const TROUBLED_HOSTS = 1024;
const DEGREES = [1, 2, 3, 4, 8];
const PLOT = fileURLToPath(new URL('../docs/scale.svg', import.meta.url));

const TROUBLES: readonly (readonly [string, Partial<CaseOptions>])[] = [
  ['1 % of packets are lost', { loss: 0.01 }],
  ['1 % of hosts have a tenth of the link', { stragglers: { share: 0.01, factor: 10 } }],
  ['1 % of hosts die within 4 s', { deaths: { share: 0.01, withinS: 4 } }],
];

export async function benchScale(options: {
  readonly isQuick: boolean;
  readonly log: (line: string) => void;
  readonly pacing?: Pacing;
}): Promise<ScaleResult> {
  const { isQuick, log, pacing = pacingOfAddon() } = options;
  const rowOf = (hosts: number, what: string, kinds: readonly ScaleKind[], change: Partial<CaseOptions>): ScaleRow => {
    const cluster = clusterOf(hosts, 32, 16);
    const base = { ...quiet(IMAGE_BYTES, LINK_BYTES_PER_S), ...cluster, ...change };
    const figures: Partial<Record<ScaleKind, Figures>> = {};
    for (const kind of kinds) {
      const own = simulate(kind, base, pacing);
      figures[kind] = own;
      log(`${hosts} hosts, ${what}, ${kind}: ${own.allS.toFixed(2)} s`);
    }
    const [root = '', ...others] = cluster.hosts;
    const { depth } = relayTree({ topology: cluster.topology, root, hosts: others, degree: base.degree });
    return { hosts, what, depth, figures };
  };
  const sizes = (isQuick ? QUICK_SIZES : SIZES).map((hosts) => {
    const row = rowOf(hosts, 'nothing goes wrong', SCALE_KINDS, {});
    const decision = chooseFanout(factsOf(hosts));
    const chosen = decision.kind ?? 'unicast';
    return { ...row, chosen, expectedS: decision.seconds[chosen] ?? 0 };
  });
  const troubled = isQuick ? 256 : TROUBLED_HOSTS;
  const troubles = TROUBLES.map(([what, change]) => rowOf(troubled, what, SCALE_KINDS, change));
  const degrees = DEGREES.map((degree) =>
    rowOf(troubled, degree === FANOUT_DEGREE ? `${degree} (chosen)` : String(degree), ['tree'], { degree }),
  );
  const result: ScaleResult = {
    ...{ scenario: 'scale', pacing: pacing.name, imageBytes: IMAGE_BYTES, linkBytesPerS: LINK_BYTES_PER_S },
    ...{ sizes, troubles, degrees },
  };
  if (!isQuick) await writeFile(PLOT, plotScale(result));
  return result;
}

/** What the planner would know of such a fork, if all hosts hear the group. */
function factsOf(hosts: number): FanoutFacts {
  return {
    ...{ wish: 'auto', root: 'h0', imageBytes: IMAGE_BYTES, linkBytesPerS: LINK_BYTES_PER_S },
    joiningHosts: clusterOf(hosts, 32, 16).hosts.slice(1),
    ...{ fetch: 'all', pageBytes: 4096, transport: 'tcp', probe: { deafHosts: [], largestBytes: 1500 } },
  };
}

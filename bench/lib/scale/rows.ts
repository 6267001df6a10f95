/** The tables and the plot of the `scale` benchmark. */
import { type Plot, svgOf } from '../svg-plot.js';
import { type Figures, SCALE_KINDS, type ScaleKind } from './model.js';

export interface ScaleRow {
  readonly hosts: number;
  readonly what: string;
  /** Levels of the tree of relays. */
  readonly depth: number;
  readonly figures: Readonly<Partial<Record<ScaleKind, Figures>>>;
}

export interface ScaleResult {
  readonly scenario: 'scale';
  readonly pacing: string;
  readonly imageBytes: number;
  readonly linkBytesPerS: number;
  /** A row for each number of hosts, with what the planner chooses and expects. */
  readonly sizes: readonly (ScaleRow & { readonly chosen: string; readonly expectedS: number })[];
  /** What goes wrong, and trees of other degrees. */
  readonly troubles: readonly ScaleRow[];
  readonly degrees: readonly ScaleRow[];
}

const GIB = 2 ** 30;

export function printScale(result: ScaleResult): string {
  const { imageBytes, linkBytesPerS, pacing, sizes, troubles, degrees } = result;
  const images = (bytes: number): string => (bytes / imageBytes).toFixed(2);
  const timesOf = ({ figures }: ScaleRow, kind: ScaleKind, pick: (of: Figures) => string): string => {
    const own = figures[kind];
    return own === undefined ? '–' : pick(own);
  };
  return [
    `An image of ${imageBytes / GIB} GiB, links of ${(linkBytesPerS * 8) / 1e9} Gbit/s, racks of 32, pods of 16, ` +
      `switches 4:1; multicast paced by ${pacing}`,
    '',
    ...table(
      ['hosts', ...SCALE_KINDS.map((kind) => `${kind}: s (images sent by the root)`), '`auto` takes', 'it expects s'],
      sizes.map((row) => [
        String(row.hosts),
        ...SCALE_KINDS.map((kind) => timesOf(row, kind, (of) => `${time(of.allS)} (${images(of.rootEgressBytes)})`)),
        row.chosen,
        time(row.expectedS),
      ]),
    ),
    '',
    ...table(
      ['hosts', 'what goes wrong', ...SCALE_KINDS.map((kind) => `${kind}: s, half / 99 % / all`)],
      troubles.map((row) => [
        String(row.hosts),
        row.what,
        ...SCALE_KINDS.map((kind) => timesOf(row, kind, (of) => [of.halfS, of.mostS, of.allS].map(time).join(' / '))),
      ]),
    ),
    '',
    ...table(
      ['hosts', 'hosts that read from one', 'levels', 'tree: s', 'images sent by the root'],
      degrees.map((row) => [
        String(row.hosts),
        row.what,
        String(row.depth),
        timesOf(row, 'tree', (of) => time(of.allS)),
        timesOf(row, 'tree', (of) => images(of.rootEgressBytes)),
      ]),
    ),
  ].join('\n');
}

export function plotScale({ sizes, imageBytes, linkBytesPerS }: ScaleResult): string {
  const what = `${imageBytes / GIB} GiB, links of ${(linkBytesPerS * 8) / 1e9} Gbit/s`;
  const plot = (title: string, yLabel: string, pick: (of: Figures) => number): Plot => ({
    ...{ title, xLabel: 'hosts', yLabel },
    lines: SCALE_KINDS.map((name) => ({
      name,
      points: sizes.flatMap(({ hosts, figures }) => {
        const own = figures[name];
        return own === undefined ? [] : [{ x: hosts, y: pick(own) }];
      }),
    })),
  });
  return svgOf([
    plot(`Time until all hosts are full (model: ${what})`, 'seconds', ({ allS }) => allS),
    plot('What the root sends', 'images', ({ rootEgressBytes }) => rootEgressBytes / imageBytes),
  ]);
}

function time(s: number): string {
  return s < 100 ? s.toFixed(1) : String(Math.round(s));
}

function table(head: readonly string[], rows: readonly (readonly string[])[]): string[] {
  const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line)];
}

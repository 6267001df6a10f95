/**
 * Draws lines over logarithmic axes as SVG text. Its colours follow the reader's choice of light or dark, and each line
 * has its name at its end, so that no colour has to be told from another.
 */
export interface PlotLine {
  readonly name: string;
  readonly points: readonly { readonly x: number; readonly y: number }[];
}

export interface Plot {
  readonly title: string;
  readonly xLabel: string;
  readonly yLabel: string;
  readonly lines: readonly PlotLine[];
}

const WIDTH = 760;
const PLOT_HEIGHT = 330;
const LEFT = 78;
const RIGHT = 150;
const TOP = 40;
const BOTTOM = 52;
const LABEL_HEIGHT = 16;

const STYLE = `
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600 }
  .ground { fill: #ffffff }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .line { fill: none; stroke-width: 2.2 }
  .c0 { stroke: #cf222e; fill: #cf222e } .c1 { stroke: #0969da; fill: #0969da }
  .c2 { stroke: #1a7f37; fill: #1a7f37 } .c3 { stroke: #8250df; fill: #8250df }
  text.c0, text.c1, text.c2, text.c3 { stroke: none }
  path.c0, path.c1, path.c2, path.c3 { fill: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .ground { fill: #0d1117 } .grid { stroke: #30363d }
    .c0 { stroke: #ff7b72; fill: #ff7b72 } .c1 { stroke: #58a6ff; fill: #58a6ff }
    .c2 { stroke: #3fb950; fill: #3fb950 } .c3 { stroke: #bc8cff; fill: #bc8cff }
    path.c0, path.c1, path.c2, path.c3 { fill: none }
  }`;
const DASHES = ['', '7 4', '2 3', '9 3 2 3'];

/** The plots are below each other. Values must be above zero. */
export function svgOf(plots: readonly Plot[]): string {
  const height = plots.length * PLOT_HEIGHT;
  const titles = escaped(plots.map(({ title }) => title).join('; '));
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" role="img"`,
    `aria-label="${titles}">`,
    `<style>${STYLE}</style>`,
    `<rect class="ground" width="${WIDTH}" height="${height}"/>`,
    ...plots.map((plot, index) => `<g transform="translate(0 ${index * PLOT_HEIGHT})">\n${drawn(plot)}\n</g>`),
    '</svg>\n',
  ].join('\n');
}

interface Scale {
  readonly ticks: readonly number[];
  readonly at: (value: number) => number;
}

function drawn({ title, xLabel, yLabel, lines }: Plot): string {
  const points = lines.flatMap((line) => line.points);
  const bottom = PLOT_HEIGHT - BOTTOM;
  const x = scaleOf(
    points.map((point) => point.x),
    LEFT,
    WIDTH - RIGHT,
  );
  const y = scaleOf(
    points.map((point) => point.y),
    bottom,
    TOP,
  );
  const right = WIDTH - RIGHT;
  const middle = (TOP + bottom) / 2;
  return [
    `<text class="title" x="${LEFT}" y="22">${escaped(title)}</text>`,
    ...x.ticks.flatMap((tick) => [
      `<line class="grid" x1="${px(x.at(tick))}" y1="${TOP}" x2="${px(x.at(tick))}" y2="${bottom}"/>`,
      `<text x="${px(x.at(tick))}" y="${bottom + 18}" text-anchor="middle">${numberText(tick)}</text>`,
    ]),
    ...y.ticks.flatMap((tick) => [
      `<line class="grid" x1="${LEFT}" y1="${px(y.at(tick))}" x2="${right}" y2="${px(y.at(tick))}"/>`,
      `<text x="${LEFT - 8}" y="${px(y.at(tick) + 4)}" text-anchor="end">${numberText(tick)}</text>`,
    ]),
    `<text x="${(LEFT + right) / 2}" y="${PLOT_HEIGHT - 12}" text-anchor="middle">${escaped(xLabel)}</text>`,
    `<text transform="translate(16 ${middle}) rotate(-90)" text-anchor="middle">${escaped(yLabel)}</text>`,
    ...lines.map((line, index) => {
      const way = line.points.map((point) => `${px(x.at(point.x))} ${px(y.at(point.y))}`).join('\nL ');
      const dash = DASHES[index % DASHES.length] === '' ? '' : ` stroke-dasharray="${DASHES[index % DASHES.length]}"`;
      return `<path class="line c${index % DASHES.length}" d="M ${way}"${dash}/>`;
    }),
    ...labels(lines, y, { left: right + 8, bottom }),
  ].join('\n');
}

/** The names at the ends of the lines, moved apart where these are close, and up where the lowest leave the plot. */
function labels(lines: readonly PlotLine[], y: Scale, { left, bottom }: { left: number; bottom: number }): string[] {
  const wanted = lines
    .map(({ name, points }, index) => ({ name, index, at: y.at(points.at(-1)?.y ?? 1) }))
    .toSorted((a, b) => a.at - b.at);
  for (const [index, label] of wanted.entries()) {
    label.at = Math.max(label.at, (wanted[index - 1]?.at ?? -Infinity) + LABEL_HEIGHT);
  }
  let below = bottom - 4 + LABEL_HEIGHT;
  for (const label of wanted.toReversed()) below = label.at = Math.min(label.at, below - LABEL_HEIGHT);
  return wanted.map(
    ({ name, index, at }) =>
      `<text class="c${index % DASHES.length}" x="${left}" y="${px(at + 4)}">${escaped(name)}</text>`,
  );
}

/** Powers of ten around all values. */
function scaleOf(values: readonly number[], from: number, to: number): Scale {
  const low = Math.floor(Math.log10(Math.min(...values)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values))));
  const ticks = Array.from({ length: high - low + 1 }, (_, index) => 10 ** (low + index));
  return { ticks, at: (value) => from + ((Math.log10(value) - low) / (high - low)) * (to - from) };
}

function px(value: number): number {
  return Math.round(value * 10) / 10;
}

function numberText(value: number): string {
  return value < 1 ? String(Number(value.toPrecision(1))) : Math.round(value).toLocaleString('en').replaceAll(',', ' ');
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');
}

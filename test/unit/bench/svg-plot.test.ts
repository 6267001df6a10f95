import { expect, test } from 'vitest';
import { svgOf } from '../../../bench/lib/svg-plot.js';

const lines = [
  {
    name: 'one',
    points: [
      { x: 10, y: 1 },
      { x: 1000, y: 100 },
    ],
  },
  {
    name: 'a < b',
    points: [
      { x: 10, y: 0.5 },
      { x: 1000, y: 98 },
    ],
  },
];
const text = svgOf([{ title: 'T & U', xLabel: 'hosts', yLabel: 's', lines }]);

test('a plot has its axes, a line for each row with its name, and colours for light and dark', () => {
  expect(text).toContain('T &amp; U');
  expect(text).toContain('a &lt; b');
  expect(text.match(/<path class="line/g)).toHaveLength(2);
  expect(text).toContain('prefers-color-scheme: dark');
  for (const tick of ['0.1', '1', '10', '100', '1 000']) expect(text).toContain(`>${tick}</text>`);
  expect(text).not.toMatch(/NaN|undefined|Infinity/);
});

test('equal factors are equal distances', () => {
  const xs = [...text.matchAll(/x1="([\d.]+)" y1="40" x2="\1"/g)].map((match) => Number(match[1]));
  expect(xs).toHaveLength(3);
  expect(xs[2]! - xs[1]!).toBeCloseTo(xs[1]! - xs[0]!, 0);
});

test('names of lines that end close to each other do not cover each other', () => {
  const ys = [...text.matchAll(/<text class="c\d" x="\d+" y="([\d.]+)"/g)].map((match) => Number(match[1]));
  expect(ys).toHaveLength(2);
  expect(Math.abs(ys[0]! - ys[1]!)).toBeGreaterThanOrEqual(16);
});

import { dirname } from 'node:path';
import { describe, expect, test } from 'vitest';
import { allFiles, codeFiles, complaints, filesUnder, isGenerated, type TextFile } from './tree.js';

const LINES_MAX = 400;
/** Longer files, each with the reason why it is still one concern. */
const LONGER_FOR_A_REASON: Record<string, string> = {};

describe('names', () => {
  const words = (identifier: string): string[] =>
    identifier
      .replace(/([a-z\d])([A-Z])/g, '$1_$2')
      .toLowerCase()
      .split(/[_$]+/);

  /** Field names of structs of the kernel, libc and libibverbs. */
  const FOREIGN_FIELDS = /(\.|->)(src|dst|src_qp|saddr|daddr)\b/g;
  /** The folder src/, in paths and in lists of folders. */
  const FOLDER = /(?<=['"`/ ])src(?=['"`/])|\bsrc\\?\//g;

  test('say source and target', () => {
    const short = new Set(['src', 'dst', 'dest']);
    expect(
      complaints(
        codeFiles().filter((file) => file.path !== 'test/tidy/text.test.ts'),
        (line) => {
          const own = line.replace(FOREIGN_FIELDS, '').replace(FOLDER, '');
          const found = (own.match(/[A-Za-z_$][\w$]*/g) ?? []).find((name) =>
            words(name).some((word) => short.has(word)),
          );
          return found === undefined ? null : `${found}: say source or target`;
        },
      ),
    ).toEqual([]);
  });

  test('of C++ headers are .hpp, and guarded by #pragma once', () => {
    const headers = filesUnder('native').filter(({ path }) => path.endsWith('.hpp'));
    expect(headers.filter(({ text }) => !text.includes('#pragma once')).map(({ path }) => path)).toEqual([]);
    const plain = filesUnder('native').filter(
      ({ path }) => path.endsWith('.h') && !/^native\/(preload|launcher)\//.test(path),
    );
    expect(plain.map(({ path }) => path)).toEqual([]);
  });
});

const COLUMNS_MAX = 120;
/** Files written elsewhere, or by a program. */
const FOREIGN_LINES = /^(package-lock\.json|LICENSE)$|^test\/fixtures\//;

/** Returns the lines of a Markdown file, with rows of tables and blocks of code empty, because these may be long. */
function prose(file: TextFile): string[] {
  let isCode = false;
  return file.lines.map((line) => {
    if (line.startsWith('```')) isCode = !isCode;
    return isCode || line.startsWith('|') ? '' : line;
  });
}

/** Counts code points: a character outside the basic plane is one column, not two. */
const columns = (line: string): number => Array.from(line).length;

test(`no line has more than ${COLUMNS_MAX} columns`, () => {
  const files = allFiles().filter((file) => !FOREIGN_LINES.test(file.path) && !isGenerated(file));
  const long = files.flatMap((file) =>
    (file.path.endsWith('.md') ? prose(file) : file.lines).flatMap((line, index) =>
      columns(line) > COLUMNS_MAX ? [`${file.path}:${index + 1}: ${columns(line)}`] : [],
    ),
  );
  expect(long).toEqual([]);
});

const FOLDER_FILES_MAX = 25;

test(`no folder has more than ${FOLDER_FILES_MAX} files of its own`, () => {
  const counts = new Map<string, number>();
  for (const { path } of allFiles()) counts.set(dirname(path), (counts.get(dirname(path)) ?? 0) + 1);
  expect([...counts].filter(([, count]) => count > FOLDER_FILES_MAX)).toEqual([]);
});

describe('files', () => {
  test(`have at most ${LINES_MAX} lines`, () => {
    const long = codeFiles().filter((file) => file.lines.length > LINES_MAX && !isGenerated(file));
    expect(
      long.filter(({ path }) => !(path in LONGER_FOR_A_REASON)).map(({ path, lines }) => `${path}: ${lines.length}`),
    ).toEqual([]);
    const paths = new Set(long.map(({ path }) => path));
    expect(
      Object.keys(LONGER_FOR_A_REASON).filter((path) => !paths.has(path)),
      'no longer long: take it off the list',
    ).toEqual([]);
  });

  test('have no unfinished business', () => {
    const marker = new RegExp(`\\b(${['TO', 'DO'].join('')}|${['FIX', 'ME'].join('')}|${'X'.repeat(3)})\\b`);
    const files = allFiles().filter(({ path }) => path !== 'package-lock.json' && path !== 'LICENSE');
    // mktemp's template is not a note to self.
    expect(complaints(files, (line) => (marker.test(line.replace(/\.X{6}/g, '')) ? line.trim() : null))).toEqual([]);
  });

  test('know nothing of the machine they were written on', () => {
    const machine = new RegExp(`(?<![\\w$}.*/-])/(${['work', 'root', 'home'].join('|')})/`);
    expect(complaints(allFiles(), (line) => (machine.test(line) ? line.trim() : null))).toEqual([]);
  });

  test('name no package registry', () => {
    const registry = new RegExp(`${['"resolved', '"'].join('')}|registry\\.(npmjs|yarnpkg)|npm\\.pkg\\.`);
    const files = allFiles().filter(({ path }) => path !== 'test/tidy/text.test.ts');
    expect(complaints(files, (line) => (registry.test(line) ? line.trim() : null))).toEqual([]);
  });

  test('end with one newline and have no trailing blanks', () => {
    const files = codeFiles();
    expect(files.filter(({ text }) => !text.endsWith('\n') || text.endsWith('\n\n')).map(({ path }) => path)).toEqual(
      [],
    );
    expect(complaints(files, (line) => (/[ \t]$/.test(line) ? 'trailing blank' : null))).toEqual([]);
  });
});

test('no test is left alone in the run, repeated until it passes, or declared for later', () => {
  const pattern = new RegExp(`\\b(test|it|describe)\\.(${['only', 'todo'].join('|')})\\b|\\bretry:\\s*[1-9]`);
  const files = filesUnder('test').filter(({ path }) => path !== 'test/tidy/text.test.ts');
  expect(complaints(files, (line) => (pattern.test(line) ? line.trim() : null))).toEqual([]);
});

test('a stated memory order is labelled with its partner', () => {
  const files = filesUnder('native').filter(({ path }) => /\.(cpp|hpp|c|h)$/.test(path) && !path.includes('/tests/'));
  const ordered =
    /memory_order(_|::)(acquire|release|acq_rel|seq_cst|consume)|__ATOMIC_(ACQUIRE|RELEASE|ACQ_REL|SEQ_CST)/;
  const label = /\/\/.*\b[A-Z]+\d+\b|\/\*.*\b[A-Z]+\d+\b|\bpairs with\b/;
  const lonely = files.flatMap((file) =>
    file.lines.flatMap((line, index) =>
      ordered.test(line) && !file.lines.slice(Math.max(0, index - 6), index + 1).some((near) => label.test(near))
        ? [`${file.path}:${index + 1}: ${line.trim()}`]
        : [],
    ),
  );
  expect(lonely).toEqual([]);
});

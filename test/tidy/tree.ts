import { readdirSync, readFileSync } from 'node:fs';
import { dirname, extname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** Names that are skipped. In a linked worktree `.git` is a file. */
const NAMES_SKIPPED = new Set(['.git', 'node_modules', 'dist', 'build', 'coverage', '.cache']);
const CODE_EXTENSIONS = new Set(['.ts', '.mjs', '.c', '.h', '.cpp', '.hpp']);
const BINARY_EXTENSIONS = new Set(['.png', '.gz', '.bin', '.svg']);

export interface TextFile {
  /** Path relative to the repository, with forward slashes. */
  path: string;
  text: string;
  lines: string[];
}

function* walk(folder: string): Generator<string> {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    if (NAMES_SKIPPED.has(entry.name)) continue;
    if (entry.isDirectory()) yield* walk(join(folder, entry.name));
    else if (entry.isFile() && !BINARY_EXTENSIONS.has(extname(entry.name))) {
      yield join(folder, entry.name);
    }
  }
}

let cached: TextFile[] | undefined;

/** Returns all text files of the repository but build outputs, sorted by path. */
export function allFiles(): TextFile[] {
  cached ??= [...walk(root)]
    .map((path) => {
      const text = readFileSync(path, 'utf8');
      return { path: relative(root, path), text, lines: text.split('\n') };
    })
    .sort((a, b) => (a.path < b.path ? -1 : 1));
  return cached;
}

export function filesUnder(folder: string): TextFile[] {
  return allFiles().filter(({ path }) => path.startsWith(`${folder}/`));
}

export function codeFiles(): TextFile[] {
  return allFiles().filter(({ path }) => CODE_EXTENSIONS.has(extname(path)));
}

/** Returns `path:line: complaint` for each line about which `complain` returns a text. */
export function complaints(files: TextFile[], complain: (line: string, file: TextFile) => string | null): string[] {
  return files.flatMap((file) =>
    file.lines.flatMap((line, index) => {
      const complaint = complain(line, file);
      return complaint === null ? [] : [`${file.path}:${index + 1}: ${complaint}`];
    }),
  );
}

/** Returns whether the head of the file says that a program has generated it. */
export function isGenerated(file: TextFile): boolean {
  return /\bgenerated (by|from)\b/i.test(file.lines.slice(0, 3).join('\n'));
}

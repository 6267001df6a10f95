import { readFileSync } from 'node:fs';

/** From package.json, the one place where it is written down. The same from src/cli and from dist/cli. */
export const VERSION: string = (
  JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }
).version;

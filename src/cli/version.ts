import { readFileSync } from 'node:fs';

/** Read from package.json, the only place that states it. The relative path is the same from src/cli and dist/cli. */
export const VERSION: string = (
  JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }
).version;

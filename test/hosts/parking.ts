/** Parks a daemon at fault points until a test releases it (src/agent/inject.ts, `park`). */
import { existsSync } from 'node:fs';
import { rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { eventually } from './cluster.js';

/** The fault points that the host of a fork passes before the commit, in this order. */
export const AGENT_POINTS_BEFORE_COMMIT = [
  'agent:fork:prepare',
  'agent:fork:prepared',
  'agent:fork:arm',
  'agent:fork:point',
  'agent:fork:stopped',
  'agent:fork:saved',
  'agent:fork:pointed',
  'agent:fork:load',
  'agent:fork:loaded',
  'agent:fork:commit',
];

/** The fault points of the same host that follow, until the clones run. At the third some of them run. */
export const AGENT_POINTS_AFTER_COMMIT = [
  'agent:fork:committed',
  'agent:fork:run',
  'agent:fork:resume',
  'agent:fork:running',
];

const PARKED_MS = 60_000;

export class Parking {
  constructor(
    private readonly directory: string,
    private readonly points: readonly string[],
  ) {}

  /** The environment for the daemon's start. The daemon does not wait at a point before `arm`. */
  get environment(): Record<string, string> {
    return { VMIGRATE_FAULT: this.points.map((point) => `${point}=park:${this.#file(point)}`).join(';') };
  }

  async arm(point: string): Promise<void> {
    await writeFile(this.#file(point), '');
  }

  async parked(point: string): Promise<void> {
    await eventually(`the daemon parks at ${point}`, PARKED_MS, () =>
      existsSync(`${this.#file(point)}.parked`) ? true : undefined,
    );
  }

  async release(point: string): Promise<void> {
    await rm(this.#file(point), { force: true });
    await rm(`${this.#file(point)}.parked`, { force: true });
  }

  async releaseAll(): Promise<void> {
    for (const point of this.points) await this.release(point);
  }

  #file(point: string): string {
    return join(this.directory, `park-${point}`);
  }
}

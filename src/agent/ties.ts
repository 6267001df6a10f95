/** What ties other hosts to the sessions, forks and images of this one. By it the API decides what they may call. */
import type { ForkAgent } from './fork/agent.js';
import type { ImageStore } from './image/store.js';
import type { TargetAgent } from './migration/target-agent.js';
import type { VmManager } from './vm/vms.js';

export interface TiesOptions {
  readonly host: string;
  readonly vms: VmManager;
  readonly images: ImageStore;
  readonly target: TargetAgent;
  readonly forks: ForkAgent;
}

export class Ties {
  readonly #options: TiesOptions;

  constructor(options: TiesOptions) {
    this.#options = options;
  }

  sourceOf(session: string): string | null {
    return this.#options.target.sourceOf(session);
  }

  rootOf(fork: string): string | null {
    const { forks, host } = this.#options;
    const request = forks.requestOf(fork);
    return request === null ? null : (request.origin?.host ?? host);
  }

  joinedOf(fork: string): readonly string[] | null {
    const { forks } = this.#options;
    const request = forks.requestOf(fork);
    if (request === null) return null;
    // A fork of an earlier build does not say.
    return request.origin === undefined ? (request.hosts ?? null) : [];
  }

  /** Images of earlier builds say only who reads them. */
  hostsOf(image: string): readonly string[] | null {
    const { images } = this.#options;
    if (!images.has(image)) return null;
    const { sharedWith = [], readers = [], servedTo = [], served } = images.get(image);
    return [...sharedWith, ...readers, ...servedTo, ...(served === undefined ? [] : [served.host])];
  }

  imageOf(name: string, uuid: string | null): string | null | undefined {
    const { vms } = this.#options;
    if (!vms.has(name)) return undefined;
    const { spec, image } = vms.get(name);
    return uuid !== null && spec.uuid !== uuid ? undefined : image;
  }
}

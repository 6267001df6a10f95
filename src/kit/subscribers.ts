/**
 * The subscriptions to changes of things with an id. If a listener throws, the error is reported and the subscription
 * stays. What changes never fails because of a listener.
 */
export class Subscribers<View extends { readonly id: string }> {
  readonly #byId = new Map<string, Set<(view: View) => void>>();
  readonly #onFailure: (error: unknown) => void;

  constructor(onFailure: (error: unknown) => void) {
    this.#onFailure = onFailure;
  }

  add(id: string, listener: (view: View) => void): () => void {
    const listeners = this.#byId.get(id) ?? new Set();
    this.#byId.set(id, listeners);
    listeners.add(listener);
    return () => {
      listeners.delete(listener);
      if (listeners.size === 0 && this.#byId.get(id) === listeners) this.#byId.delete(id);
    };
  }

  tell(view: View): void {
    for (const id of [view.id, '*']) {
      for (const listener of this.#byId.get(id) ?? []) {
        try {
          listener(view);
        } catch (error) {
          this.#onFailure(error);
        }
      }
    }
  }
}

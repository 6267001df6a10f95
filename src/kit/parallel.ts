/** Parallel work on many items, with a limit on how many at once. */

export type Outcome<T> = { readonly value: T } | { readonly error: unknown };

/** Returns the outcome of each item, in the order of the items. Never rejects. */
export async function inParallel<Item, T>(
  items: readonly Item[],
  limit: number,
  work: (item: Item, index: number) => Promise<T>,
): Promise<Outcome<T>[]> {
  const outcomes: Outcome<T>[] = [];
  let next = 0;
  const worker = async (): Promise<void> => {
    for (;;) {
      const index = next++;
      const item = items[index];
      if (index >= items.length || item === undefined) return;
      try {
        outcomes[index] = { value: await work(item, index) };
      } catch (error) {
        outcomes[index] = { error };
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(limit, items.length) }, worker));
  return outcomes;
}

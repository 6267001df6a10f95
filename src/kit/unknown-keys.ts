/**
 * Reads records and calls of a newer version. Their `version` decides whether this build understands them. A key that
 * this build does not know is kept and written back, so that a record survives a daemon of an older version, and a spec
 * survives a stay on a host of an older version. Only the input of users is checked for unknown keys.
 */
import type { z } from 'zod';

type Path = readonly PropertyKey[];

/** How often a schema may name further unknown keys, for example behind a choice that the first ones had decided. */
const ROUNDS_MAX = 8;

/**
 * Parses like `schema.safeParse`, but accepts keys that the schema does not know, and keeps them in the result at the
 * same place. The value is not changed.
 */
export function parseKeepingUnknown<T>(
  schema: z.ZodType<T>,
  value: unknown,
): { success: true; data: T } | { success: false; error: z.ZodError<T> } {
  let known = value;
  const kept: { path: Path; key: string; value: unknown }[] = [];
  for (let round = 0; ; round++) {
    const parsed = schema.safeParse(known);
    if (parsed.success) {
      for (const { path, key, value: unknownValue } of kept) setAt(parsed.data, path, key, unknownValue);
      return parsed;
    }
    const { issues } = parsed.error;
    const unknown = issues.flatMap((issue) =>
      issue.code === 'unrecognized_keys' ? issue.keys.map((key) => ({ path: issue.path, key })) : [],
    );
    if (round >= ROUNDS_MAX || unknown.length === 0 || issues.some(({ code }) => code !== 'unrecognized_keys')) {
      return parsed;
    }
    known = round === 0 ? structuredClone(known) : known;
    for (const { path, key } of unknown) {
      const holder = at(known, path);
      if (!isObject(holder)) return parsed;
      kept.push({ path, key, value: holder[key] });
      delete holder[key];
    }
  }
}

/** Like parseKeepingUnknown, but throws the schema's error. */
export function parseKept<T>(schema: z.ZodType<T>, value: unknown): T {
  const parsed = parseKeepingUnknown(schema, value);
  if (parsed.success) return parsed.data;
  throw parsed.error;
}

function isObject(value: unknown): value is Record<PropertyKey, unknown> {
  return typeof value === 'object' && value !== null;
}

function at(value: unknown, path: Path): unknown {
  return path.reduce<unknown>((part, key) => (isObject(part) ? part[key] : undefined), value);
}

/** A schema that rebuilds a part in another form has no place for the key, which is then dropped. */
function setAt(value: unknown, path: Path, key: string, unknownValue: unknown): void {
  const holder = at(value, path);
  if (!isObject(holder) || Object.hasOwn(holder, key)) return;
  Object.defineProperty(holder, key, { value: unknownValue, enumerable: true, configurable: true, writable: true });
}

/** Ties schemas to their domain types, and sets the bounds of texts and lists. */
import { z } from 'zod';

const TEXT_MAX = 4096;

const LIST_MAX = 4096;

export const text = z.string().max(TEXT_MAX);

export const count = z.number().nonnegative();

export const list = <T extends z.ZodType>(item: T) => z.array(item).max(LIST_MAX);

/** T as zod infers it: an optional member may also be undefined. */
type Shape<T> = T extends readonly (infer Item)[]
  ? readonly Shape<Item>[]
  : T extends object
    ? { [K in keyof T]: Shape<T[K]> | (Pick<T, K> extends Required<Pick<T, K>> ? never : undefined) }
    : T;

/** Types a schema as that of a domain type. A schema that lacks a member, or has a wider one, does not compile. */
export function of<T>(schema: z.ZodType<Shape<T>>): z.ZodType<T> {
  return schema as z.ZodType<unknown> as z.ZodType<T>;
}

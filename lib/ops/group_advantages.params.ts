import { ArgumentError, describe, InternalError } from '../errors.ts';
import { native } from '../native/load.ts';

/**
 * A native parameter list: its array, kept from call to call (native code reads it before it
 * returns), and the place of each name in it. This op is called on a handful of numbers, where the
 * lookups by name of packParams would take longer than the work.
 */
export interface ParamPack<Name extends string> {
  readonly array: Float64Array;
  readonly defaults: Float64Array;
  readonly at: Readonly<Record<Name, number>>;
}

export function paramPack<Name extends string>(op: string): ParamPack<Name> {
  const table = native().params[op];
  if (table === undefined) throw new InternalError(`The addon has no parameter list ${op}`);
  const at = Object.fromEntries(table.names.map((name, i) => [name, i]));
  return {
    array: new Float64Array(table.names.length),
    defaults: Float64Array.from(table.defaults),
    at: at as Record<Name, number>,
  };
}

/** The array with the defaults in it. */
export function freshParams(pack: ParamPack<never>): Float64Array {
  const { array, defaults } = pack;
  for (let i = 0; i < array.length; i++) array[i] = defaults[i] as number;
  return array;
}

/** Writes an option that was given. @throws ArgumentError unless it is a number or boolean. */
export function putNumber(
  params: Float64Array,
  at: number,
  option: string,
  value: number | boolean | undefined,
): void {
  if (value === undefined) return;
  if (typeof value !== 'number' && typeof value !== 'boolean') {
    throw new ArgumentError(`Expected \`${option}\` to be a number, received ${describe(value)}`);
  }
  params[at] = Number(value);
}

const tables = new Map<string, Map<string, number>>();

/** Writes the code of a choice that was given. @throws ArgumentError listing the choices. */
export function putChoice(
  params: Float64Array,
  at: number,
  table: string,
  option: string,
  value: string | undefined,
): void {
  if (value === undefined) return;
  let codes = tables.get(table);
  if (codes === undefined) {
    const names = native().enums[`groupAdvantages.${table}`] ?? [];
    codes = new Map(names.map((name, code) => [name, code]));
    tables.set(table, codes);
  }
  const code = codes.get(value);
  if (code === undefined) {
    throw new ArgumentError(
      `Expected \`${option}\` to be one of ${[...codes.keys()].join(', ')}, received ${describe(value)}`,
    );
  }
  params[at] = code;
}

/** `given` over `below`, where an option that is undefined counts as not given. */
export function over<O extends object>(below: O, given: O): O {
  const merged = { ...below };
  for (const name in given) {
    if (given[name] !== undefined) merged[name] = given[name];
  }
  return merged;
}

/** @throws ArgumentError unless `count` is a positive integer, or undefined. */
export function checkGenerations(count: number | undefined): number | undefined {
  if (count !== undefined && (!Number.isSafeInteger(count) || count < 1)) {
    throw new ArgumentError(
      `Expected \`numGenerations\` to be an integer of at least 1, received ${describe(count)}`,
    );
  }
  return count;
}

import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type DType, newArray, type TypedArray } from '../../lib/dtype.ts';

const folder = join(dirname(fileURLToPath(import.meta.url)), '..', 'fixtures');

export interface FixtureTensor {
  readonly shape: readonly number[];
  readonly dtype: DType;
  /** bf16 as raw bits. */
  readonly data: TypedArray;
}

/** One case of tests/fixtures/trl/<name>.json; the fields are explained in the README there. */
export interface Fixture {
  readonly case: string;
  readonly source: Readonly<Record<string, string>>;
  readonly inputs: Readonly<Record<string, FixtureTensor>>;
  readonly options: Readonly<Record<string, unknown>>;
  /** Scalars as tensors of shape []. */
  readonly outputs: Readonly<Record<string, FixtureTensor>>;
  readonly metrics: Readonly<Record<string, number>>;
  readonly note?: string;
}

interface RawTensor {
  shape: number[];
  dtype: DType;
  data: (number | string)[];
}

/** The cases of a file; `fixtures('token_logprobs')`. Throws when the file does not exist. */
export function fixtures(name: string, project = 'trl'): Fixture[] {
  const path = join(folder, project, `${name}.json`);
  if (!existsSync(path)) throw new Error(`No such fixture: ${path}`);
  const cases = JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>[];
  return cases.map(
    (raw) =>
      ({
        ...raw,
        inputs: tensors(raw['inputs']),
        outputs: tensors(raw['outputs']),
        metrics: Object.fromEntries(
          Object.entries((raw['metrics'] ?? {}) as Record<string, number | string>).map(
            ([key, value]) => [key, Number(value)],
          ),
        ),
      }) as unknown as Fixture,
  );
}

/** The tensor `name` of a group, which must be there. */
export function tensorOf(group: Readonly<Record<string, FixtureTensor>>, name: string) {
  const tensor = group[name];
  if (tensor === undefined) throw new Error(`The fixture has no ${name}`);
  return tensor;
}

function tensors(group: unknown): Record<string, FixtureTensor> {
  return Object.fromEntries(
    Object.entries((group ?? {}) as Record<string, RawTensor | number | string>).map(
      ([name, value]) => [name, tensor(value)],
    ),
  );
}

function tensor(value: RawTensor | number | string): FixtureTensor {
  // "NaN" and "Infinity" are strings, since JSON has no such numbers.
  if (typeof value !== 'object') {
    return { shape: [], dtype: 'f64', data: Float64Array.of(Number(value)) };
  }
  const { shape, dtype } = value;
  const data = newArray(dtype, value.data.length) as TypedArray;
  data.set(value.data.map(Number));
  return { shape, dtype, data };
}

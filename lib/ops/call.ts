/**
 * What every op does around its native call: read inputs, allocate outputs, pack parameters, run.
 *
 * Results come in the form of the op's first input: a `Tensor` in gives `Tensor`s out, a typed array
 * in gives typed arrays out.
 */
import {
  type ArrayOf,
  arrayFits,
  DTYPE_CODE,
  DTYPE_SIZE,
  type DType,
  dtypeOfArray,
  newArray,
} from '../dtype.ts';
import {
  ArgumentError,
  DTypeError,
  describe,
  fromNative,
  InternalError,
  ShapeError,
} from '../errors.ts';
import type { NativeAsyncOp, NativeBuffer, NativeOp, NativeStorage } from '../native/addon.ts';
import { native } from '../native/load.ts';
import { sizeOf, Tensor } from '../tensor.ts';

/** A typed array with what the array class cannot say. */
export interface ArrayView {
  readonly data: ArrayBufferView;
  /** Needed for a `Uint16Array`: `bf16` or `f16`. */
  readonly dtype?: DType;
  readonly shape?: readonly number[];
}

/** Anything an op takes: a tensor, a typed array, or a typed array with dtype and shape. */
export type Input = Tensor | ArrayBufferView | ArrayView;

/** Options every asynchronous op takes. */
export interface AsyncOptions {
  /** Aborts the call: it ends at its next block of rows and rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** An input after {@link readInput}. */
export interface Operand {
  readonly name: string;
  readonly buffer: ArrayBufferView | NativeStorage;
  readonly dtype: DType;
  readonly size: number;
  /** As given: undefined for a bare typed array. */
  readonly shape: readonly number[] | undefined;
}

/**
 * Reads an input and checks its dtype and, when `expected` is given, its shape (a bare typed array
 * needs only the right number of elements).
 * @throws DTypeError, ShapeError, DisposedError
 */
export function readInput(
  name: string,
  value: Input,
  dtypes: readonly DType[],
  expected?: readonly number[],
): Operand {
  let buffer: ArrayBufferView | NativeStorage;
  let dtype: DType | undefined;
  let shape: readonly number[] | undefined;
  let size: number;
  if (value instanceof Tensor) {
    buffer = value.storage();
    dtype = value.dtype;
    shape = value.shape;
    size = value.size;
  } else {
    const data = ArrayBuffer.isView(value) ? value : (value as ArrayView | undefined)?.data;
    if (data === undefined || !ArrayBuffer.isView(data)) {
      throw new DTypeError(
        `Expected \`${name}\` to be a Tensor or a typed array, received ${describe(value)}`,
      );
    }
    if (data !== value) {
      dtype = (value as ArrayView).dtype;
      shape = (value as ArrayView).shape;
    }
    dtype ??= dtypeOfArray(data);
    if (dtype === undefined || !arrayFits(data, dtype)) {
      throw new DTypeError(unreadable(name, data, dtype, dtypes));
    }
    buffer = data;
    size = data.byteLength / DTYPE_SIZE[dtype];
    if (shape !== undefined && sizeOf(shape) !== size) {
      throw new ShapeError(
        `Expected \`${name}\` to hold the ${sizeOf(shape)} elements of its shape [${shape.join(', ')}], received ${size}`,
      );
    }
  }
  if (!dtypes.includes(dtype)) {
    throw new DTypeError(`Expected \`${name}\` of dtype ${dtypes.join(', ')}, received ${dtype}`);
  }
  if (expected !== undefined) checkShape(name, { shape, size }, expected);
  return { name, buffer, dtype, size, shape };
}

function unreadable(
  name: string,
  data: ArrayBufferView,
  dtype: DType | undefined,
  dtypes: readonly DType[],
): string {
  const class_ = data.constructor.name;
  if (class_ === 'BigInt64Array') {
    return `Expected \`${name}\` of dtype ${dtypes.join(', ')}, received a BigInt64Array: use Int32Array`;
  }
  if (class_ === 'Uint16Array' && dtype === undefined) {
    return `Expected a dtype with the Uint16Array \`${name}\`: { data, dtype: 'bf16' | 'f16', shape }`;
  }
  const wanted = dtype ?? dtypes.join(', ');
  return `Expected \`${name}\` of dtype ${wanted}, received ${describe(data)}`;
}

/** As {@link readInput}, for an input that may be left out. */
export function readOptional(
  name: string,
  value: Input | undefined | null,
  dtypes: readonly DType[],
  expected?: readonly number[],
): Operand | undefined {
  return value === undefined || value === null
    ? undefined
    : readInput(name, value, dtypes, expected);
}

/** @throws ShapeError unless the shapes agree; a bare array is judged by its number of elements. */
export function checkShape(
  name: string,
  actual: { shape: readonly number[] | undefined; size: number },
  expected: readonly number[],
): void {
  const { shape, size } = actual;
  const agrees =
    shape === undefined
      ? size === sizeOf(expected)
      : shape.length === expected.length && shape.every((extent, i) => extent === expected[i]);
  if (agrees) return;
  const received = shape === undefined ? `${size} elements` : `[${shape.join(', ')}]`;
  throw new ShapeError(
    `Expected \`${name}\` to have shape [${expected.join(', ')}], received ${received}`,
  );
}

/**
 * `[rows, columns]` of a matrix input. A bare typed array is split into `rows` when they are known.
 * @throws ShapeError
 */
export function matrixShape(operand: Operand, rows?: number): [number, number] {
  if (operand.shape === undefined) {
    if (rows !== undefined && rows > 0 && operand.size % rows === 0) {
      return [rows, operand.size / rows];
    }
    throw new ShapeError(
      rows === undefined || rows === 0
        ? `Expected a shape with \`${operand.name}\`: { data, shape: [rows, columns] }`
        : `Expected \`${operand.name}\` to split into ${rows} rows, received ${operand.size} elements`,
    );
  }
  const columns = operand.shape.at(-1);
  if (operand.shape.length < 2 || columns === undefined) {
    throw new ShapeError(
      `Expected \`${operand.name}\` to have at least 2 dimensions, received [${operand.shape.join(', ')}]`,
    );
  }
  return [sizeOf(operand.shape.slice(0, -1)), columns];
}

/** Code of `name` in the native enum `table`. @throws ArgumentError listing the names. */
export function enumCode(option: string, table: string, name: string): number {
  const names = native().enums[table];
  const code = names?.indexOf(name) ?? -1;
  if (code < 0) {
    throw new ArgumentError(
      `Expected \`${option}\` to be one of ${names?.join(', ')}, received ${describe(name)}`,
    );
  }
  return code;
}

/** Code of a dtype, for parameters. */
export function dtypeCode(dtype: DType): number {
  return DTYPE_CODE[dtype];
}

const packed = new Map<
  string,
  { names: readonly string[]; defaults: readonly number[]; array: Float64Array }
>();

/**
 * The parameters of native op `op` as its packed array: `values` by name, the native defaults for
 * what is left out or undefined. The array is reused by the next call with the same op: native
 * functions read it before they return.
 * @throws ArgumentError when a value is not a number (or boolean).
 */
export function packParams(
  op: string,
  values: Readonly<Record<string, number | boolean | undefined>>,
): Float64Array {
  let entry = packed.get(op);
  if (entry === undefined) {
    const table = native().params[op];
    if (table === undefined) throw new InternalError(`The addon has no parameter list ${op}`);
    entry = { ...table, array: new Float64Array(table.names.length) };
    packed.set(op, entry);
  }
  const { names, defaults, array } = entry;
  for (let i = 0; i < names.length; i++) {
    const value = values[names[i] as string];
    if (value === undefined) {
      array[i] = defaults[i] as number;
    } else if (typeof value === 'number') {
      array[i] = value;
    } else if (typeof value === 'boolean') {
      array[i] = value ? 1 : 0;
    } else {
      throw new ArgumentError(
        `Expected \`${names[i]}\` to be a number, received ${describe(value)}`,
      );
    }
  }
  return array;
}

/** An output: what the caller gets, and what native code writes to. */
export type Output<D extends DType = DType> = Tensor<D> | ArrayOf<D>;

/** The output type of an op whose first input is an `I`. */
export type OutputOf<I extends Input, D extends DType = 'f32'> = I extends Tensor
  ? Tensor<D>
  : ArrayOf<D>;

/** `{ [name]: output }` when the options `O` ask for it with `[name]: true`, else nothing. */
export type Requested<O, Name extends string, Value> = O extends { readonly [K in Name]: true }
  ? { readonly [K in Name]: Value }
  : unknown;

/** A new output of `shape`: a tensor, or a typed array when the call works on arrays. */
export function newOutput<D extends DType>(
  tensors: boolean,
  dtype: D,
  shape: readonly number[],
): Output<D> {
  return tensors ? Tensor.empty(shape, dtype) : newArray(dtype, sizeOf(shape));
}

/** The native side of an output (or of an absent one). */
export function bufferOf(output: Output | undefined): NativeBuffer {
  return output instanceof Tensor ? output.storage() : output;
}

/** Runs a native op on this thread. */
export function runSync(op: string, params: Float64Array, buffers: NativeBuffer[]): void {
  try {
    (native()[op] as NativeOp)(params, ...buffers);
  } catch (error) {
    throw fromNative(error, new Error());
  }
}

/**
 * Runs a native op off-thread. Typed arrays are copied to native memory first, and outputs that are
 * typed arrays are filled when it is done, so JavaScript may detach or change its arrays meanwhile.
 * `inputs` and `outputs` are passed to the op in that order. `accumulate`: the op reads its outputs.
 */
export async function runAsync(
  op: string,
  params: Float64Array,
  inputs: readonly NativeBuffer[],
  outputs: readonly NativeBuffer[],
  signal: AbortSignal | undefined,
  accumulate = false,
): Promise<void> {
  signal?.throwIfAborted();
  const at = new Error();
  const addon = native();
  const temporary: NativeStorage[] = [];
  const stage = (buffer: NativeBuffer, copy: boolean): NativeBuffer => {
    if (!ArrayBuffer.isView(buffer)) return buffer;
    const storage = new addon.NativeStorage(buffer.byteLength, false);
    temporary.push(storage);
    if (copy) storage.write(buffer, 0);
    return storage;
  };
  try {
    const stagedInputs = inputs.map((buffer) => stage(buffer, true));
    const stagedOutputs = outputs.map((buffer) => stage(buffer, accumulate));
    await new Promise<void>((resolve, reject) => {
      let job = 0;
      const abort = () => addon.abortJob(job);
      job = (addon[`${op}Async`] as NativeAsyncOp)(
        (error) => {
          signal?.removeEventListener('abort', abort);
          if (error === undefined) resolve();
          else if ('code' in error && error.code === 'CANCELLED' && signal?.aborted)
            reject(signal.reason);
          else reject(error);
        },
        params,
        ...stagedInputs,
        ...stagedOutputs,
      );
      signal?.addEventListener('abort', abort, { once: true });
    });
    for (const [i, output] of outputs.entries()) {
      if (ArrayBuffer.isView(output)) (stagedOutputs[i] as NativeStorage).read(output, 0);
    }
  } catch (error) {
    throw signal?.aborted && error === signal.reason ? error : fromNative(error, at);
  } finally {
    for (const storage of temporary) storage.dispose();
  }
}

import {
  type ArrayOf,
  arrayFits,
  DTYPE_SIZE,
  DTYPES,
  type DType,
  dtypeOfArray,
  newArray,
  type TypedArray,
} from './dtype.ts';
import {
  ArgumentError,
  DisposedError,
  DTypeError,
  describe,
  fromNative,
  ShapeError,
} from './errors.ts';
import type { MemoryStats, NativeStorage } from './native/addon.ts';
import { native } from './native/load.ts';

export type Device = 'cpu';

export interface TensorOptions<D extends DType = DType> {
  /** Needed for a `Uint16Array`, which may hold bf16 or f16 bits; otherwise taken from the array. */
  dtype?: D;
  /** Default: one dimension, the array's length. */
  shape?: readonly number[];
}

const scopes: Set<Tensor>[] = [];

/**
 * A block of native memory with a dtype and a shape. It is dense and row-major, and never moves, so
 * asynchronous ops can work on it while JavaScript goes on.
 *
 * Free it with `dispose()`, with `using`, or by creating it inside {@link tidy}. The garbage
 * collector frees what is forgotten, but late: it sees a small object, not what hangs on it.
 */
export class Tensor<D extends DType = DType> {
  readonly dtype: D;
  readonly shape: readonly number[];
  /** Number of elements. */
  readonly size: number;
  readonly device: Device = 'cpu';
  #storage: NativeStorage | undefined;

  private constructor(dtype: D, shape: readonly number[], size: number, zero: boolean) {
    this.dtype = dtype;
    this.shape = shape;
    this.size = size;
    try {
      this.#storage = new (native().NativeStorage)(size * DTYPE_SIZE[dtype], zero);
    } catch (error) {
      throw fromNative(error, new Error());
    }
    scopes.at(-1)?.add(this);
  }

  /**
   * Copies `data` into a new tensor.
   * @throws DTypeError when the array cannot hold the dtype, or a `Uint16Array` comes without one.
   * @throws ShapeError when the shape does not have as many elements as the array.
   */
  static from<D extends DType>(
    data: TypedArray | ArrayBufferView | readonly number[],
    options: TensorOptions<D> = {},
  ): Tensor<D> {
    const array = Array.isArray(data) ? Float64Array.from(data) : (data as TypedArray);
    const dtype = options.dtype ?? (Array.isArray(data) ? 'f32' : dtypeOf(array));
    checkDType(dtype);
    if (Array.isArray(data)) {
      if (dtype === 'bf16' || dtype === 'f16') {
        throw new DTypeError(
          `Expected a Uint16Array of raw bits for dtype ${dtype}, received numbers`,
        );
      }
      const converted = newArray(dtype, array.length) as unknown as TypedArray;
      converted.set(array as unknown as ArrayLike<number>);
      return Tensor.from(converted, { ...options, dtype }) as Tensor<D>;
    }
    if (!ArrayBuffer.isView(array) || !arrayFits(array, dtype)) {
      throw new DTypeError(`Expected an array that holds ${dtype}, received ${describe(data)}`);
    }
    const shape = options.shape ?? [array.length];
    const size = sizeOf(shape);
    if (size !== array.length) {
      throw new ShapeError(
        `Expected \`shape\` to have ${array.length} elements, received [${shape.join(', ')}]`,
      );
    }
    const tensor = new Tensor(dtype, Object.freeze([...shape]), size, false);
    tensor.storage().write(array, 0);
    return tensor as Tensor<D>;
  }

  /** A tensor of zeros. */
  static zeros<D extends DType>(shape: readonly number[], dtype: D): Tensor<D> {
    checkDType(dtype);
    return new Tensor(dtype, Object.freeze([...shape]), sizeOf(shape), true);
  }

  /** A tensor whose contents are undefined, to be written by an op. */
  static empty<D extends DType>(shape: readonly number[], dtype: D): Tensor<D> {
    checkDType(dtype);
    return new Tensor(dtype, Object.freeze([...shape]), sizeOf(shape), false);
  }

  /** A copy of the contents; bf16 and f16 come as raw bits. */
  toTypedArray(): ArrayOf<D> {
    const array = newArray(this.dtype, this.size);
    this.storage().read(array, 0);
    return array;
  }

  /** Replaces the contents. */
  set(data: TypedArray | ArrayBufferView): this {
    const array = data as TypedArray;
    if (!ArrayBuffer.isView(array) || !arrayFits(array, this.dtype)) {
      throw new DTypeError(
        `Expected an array that holds ${this.dtype}, received ${describe(data)}`,
      );
    }
    if (array.length !== this.size) {
      throw new ShapeError(`Expected ${this.size} elements, received ${array.length}`);
    }
    this.storage().write(array, 0);
    return this;
  }

  /** Frees the memory, once no running op needs it. Calling it again does nothing. */
  dispose(): void {
    this.#storage?.dispose();
    this.#storage = undefined;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  get disposed(): boolean {
    return this.#storage === undefined;
  }

  /**
   * The native memory, for the ops of this package.
   * @internal
   */
  storage(): NativeStorage {
    if (this.#storage === undefined) {
      throw new DisposedError(
        `The ${this.dtype} tensor of shape [${this.shape.join(', ')}] was disposed`,
      );
    }
    return this.#storage;
  }
}

function dtypeOf(array: ArrayBufferView): DType {
  const dtype = ArrayBuffer.isView(array) ? dtypeOfArray(array) : undefined;
  if (dtype === undefined) {
    const hint =
      (array as { constructor?: { name?: string } })?.constructor?.name === 'BigInt64Array'
        ? ': vocabularies fit Int32Array'
        : ': pass { dtype }';
    throw new DTypeError(`Could not tell the dtype of ${describe(array)}${hint}`);
  }
  return dtype;
}

function checkDType(dtype: string): void {
  if (!(DTYPES as readonly string[]).includes(dtype)) {
    throw new DTypeError(`Expected a dtype (${DTYPES.join(', ')}), received ${describe(dtype)}`);
  }
}

/** Number of elements of a shape. */
export function sizeOf(shape: readonly number[]): number {
  let size = 1;
  for (const extent of shape) {
    if (!Number.isSafeInteger(extent) || extent < 0) {
      throw new ShapeError(
        `Expected \`shape\` of integers of at least 0, received [${shape.join(', ')}]`,
      );
    }
    size *= extent;
  }
  return size;
}

/**
 * Runs `fn` and disposes every tensor made while it ran, except those in what it returns (a tensor,
 * or an array or plain object of them, nested to any depth). `fn` must be synchronous; for
 * asynchronous code use `using` or `dispose()`.
 */
export function tidy<T>(fn: () => T): T {
  const scope = new Set<Tensor>();
  scopes.push(scope);
  let result: T | undefined;
  try {
    result = fn();
    if (result instanceof Promise) {
      throw new ArgumentError(
        'Expected tidy() to be given a synchronous function, received a promise',
      );
    }
    return result;
  } finally {
    scopes.pop();
    const kept = new Set<Tensor>();
    collect(result, kept);
    for (const tensor of scope) {
      if (kept.has(tensor)) scopes.at(-1)?.add(tensor);
      else tensor.dispose();
    }
  }
}

function collect(value: unknown, into: Set<Tensor>): void {
  if (value instanceof Tensor) {
    into.add(value);
  } else if (Array.isArray(value)) {
    for (const item of value) collect(item, into);
  } else if (typeof value === 'object' && value !== null && !ArrayBuffer.isView(value)) {
    for (const item of Object.values(value)) collect(item, into);
  }
}

/** Native tensors and bytes alive in the whole process, and the most there ever were. */
export function memoryStats(): MemoryStats {
  return native().memoryStats();
}

/**
 * Gives memory back to the system. Freed blocks of 4 MiB and more are kept, up to a sixteenth of the
 * machine's memory, because new pages from the system cost more than most ops do.
 */
export function emptyCache(): void {
  native().emptyCache();
}

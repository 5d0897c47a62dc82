/**
 * Storage types. The index in `DTYPES` is the native code of the type.
 *
 * JavaScript has no bf16 array: its bits travel in a `Uint16Array`. f16 bits do too, or in a
 * `Float16Array` where the runtime has one. So a `Uint16Array` never says its dtype; it is given.
 */
export const DTYPES = ['f32', 'bf16', 'f16', 'f64', 'i32', 'u8'] as const;
export type DType = (typeof DTYPES)[number];

/** Bytes per element. */
export const DTYPE_SIZE: Readonly<Record<DType, number>> = {
  f32: 4,
  bf16: 2,
  f16: 2,
  f64: 8,
  i32: 4,
  u8: 1,
};

export const DTYPE_CODE = Object.fromEntries(DTYPES.map((name, code) => [name, code])) as Readonly<
  Record<DType, number>
>;

/** The arrays that data can come in. */
export type TypedArray = Float32Array | Float64Array | Int32Array | Uint8Array | Uint16Array;

/** The array that `Tensor.toTypedArray()` returns for a dtype. */
export type ArrayOf<D extends DType> = D extends 'f32'
  ? Float32Array
  : D extends 'f64'
    ? Float64Array
    : D extends 'i32'
      ? Int32Array
      : D extends 'u8'
        ? Uint8Array
        : Uint16Array;

/** A new zeroed array for `length` elements of `dtype`. */
export function newArray<D extends DType>(dtype: D, length: number): ArrayOf<D> {
  return allocate(dtype, length) as ArrayOf<D>;
}

function allocate(dtype: DType, length: number): TypedArray {
  switch (dtype) {
    case 'f32':
      return new Float32Array(length);
    case 'f64':
      return new Float64Array(length);
    case 'i32':
      return new Int32Array(length);
    case 'u8':
      return new Uint8Array(length);
    default:
      return new Uint16Array(length);
  }
}

/** The dtype an array class stands for by itself, or undefined where it could be several. */
export function dtypeOfArray(array: ArrayBufferView): DType | undefined {
  switch (array.constructor.name) {
    case 'Float32Array':
      return 'f32';
    case 'Float64Array':
      return 'f64';
    case 'Int32Array':
      return 'i32';
    case 'Uint8Array':
    case 'Uint8ClampedArray':
    case 'Buffer':
      return 'u8';
    case 'Float16Array':
      return 'f16';
    default:
      return undefined;
  }
}

/** Whether `array` can hold the bits of `dtype`. */
export function arrayFits(array: ArrayBufferView, dtype: DType): boolean {
  const own = dtypeOfArray(array);
  if (own !== undefined) return own === dtype;
  return array.constructor.name === 'Uint16Array' && (dtype === 'bf16' || dtype === 'f16');
}

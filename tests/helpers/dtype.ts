/** bf16 and f16 bits in TypeScript, rounded to nearest, ties to even. */

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

export function toBf16(value: number): number {
  float[0] = value;
  const u = bits[0] as number;
  if (Number.isNaN(value)) return (u >>> 16) | 0x40;
  return ((u + 0x7fff + ((u >>> 16) & 1)) >>> 16) & 0xffff;
}

export function fromBf16(half: number): number {
  bits[0] = half << 16;
  return float[0] as number;
}

export function toF16(value: number): number {
  float[0] = value;
  const u = bits[0] as number;
  const sign = (u >>> 16) & 0x8000;
  const magnitude = Math.abs(float[0]);
  if (Number.isNaN(value)) return sign | 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  // The unit in the last place: 2^-24 for subnormals, else 2^(exponent - 10).
  const exponent = Math.max(-14, ((u >>> 23) & 0xff) - 127);
  const steps = roundToEven(magnitude / 2 ** (exponent - 10));
  // steps is in [0, 2048]; a carry out of the mantissa lands in the exponent, as it should.
  return sign | (((exponent + 14) << 10) + steps);
}

export function fromF16(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >>> 10) & 0x1f;
  const mantissa = half & 0x3ff;
  if (exponent === 0x1f) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  return sign * (1024 + mantissa) * 2 ** (exponent - 25);
}

function roundToEven(x: number): number {
  const low = Math.floor(x);
  const rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

export type FloatDType = 'f32' | 'bf16' | 'f16';
export const FLOAT_DTYPES: readonly FloatDType[] = ['f32', 'bf16', 'f16'];

/** `values` rounded to `dtype`, in the array that stores it. */
export function encode(values: ArrayLike<number>, dtype: FloatDType): Float32Array | Uint16Array {
  if (dtype === 'f32') return Float32Array.from(values);
  return Uint16Array.from(values, dtype === 'bf16' ? toBf16 : toF16);
}

/** The numbers that an array of `dtype` stores. */
export function decode(array: ArrayLike<number>, dtype: FloatDType): Float64Array {
  if (dtype === 'f32') return Float64Array.from(array);
  return Float64Array.from(array, dtype === 'bf16' ? fromBf16 : fromF16);
}

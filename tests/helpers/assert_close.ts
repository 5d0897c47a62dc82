/** Comparison of arrays with named tolerances. NaN and infinities are compared apart. */

export interface Tolerance {
  readonly relative: number;
  readonly absolute: number;
  /** Why it cannot be tighter, or need not be. */
  readonly reason: string;
}

/** Tolerances by storage dtype of what is compared, against float64 on the same (rounded) inputs. */
export const TOLERANCE = {
  f64: { relative: 1e-12, absolute: 1e-13, reason: 'the same formula in double precision' },
  f32: { relative: 2e-6, absolute: 1e-6, reason: 'f32 result of elementary functions in f32' },
  f32Sum: {
    relative: 1e-5,
    absolute: 2e-6,
    reason: 'f32 sums of thousands of terms of both signs',
  },
  bf16: { relative: 2 ** -8, absolute: 1e-6, reason: 'one rounding to 8 significant bits' },
  f16: { relative: 2 ** -11, absolute: 6e-8, reason: 'one rounding to 11 significant bits' },
  simdLevels: {
    relative: 4e-6,
    absolute: 2e-6,
    reason: 'instruction sets sum in another order, and not all have a fused multiply-add',
  },
  finiteDifference: {
    relative: 1e-5,
    absolute: 1e-7,
    reason: 'central differences in double precision lose about a third of the digits',
  },
  trlF32: { relative: 1e-5, absolute: 2e-6, reason: 'TRL computes in f32, in another order' },
  trlBf16: { relative: 2e-2, absolute: 2e-2, reason: 'TRL computes bf16 inputs in bf16' },
} as const satisfies Record<string, Tolerance>;

const SHOWN = 5;

/**
 * Throws unless `got` and `want` have the same length, NaN and infinities (with sign) in the same
 * places, and |got - want| <= absolute + relative * max(|got|, |want|) elsewhere. The message has
 * the first bad indices and the worst one.
 */
export function assertClose(
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  tolerance: Tolerance,
  what = 'value',
): void {
  if (got.length !== want.length) {
    throw new Error(`${what}: expected ${want.length} elements, got ${got.length}`);
  }
  const bad: string[] = [];
  let count = 0;
  let worst = 0;
  let worstIndex = -1;
  for (let i = 0; i < got.length; i++) {
    const a = got[i] as number;
    const b = want[i] as number;
    const bound = tolerance.absolute + tolerance.relative * Math.max(Math.abs(a), Math.abs(b));
    const error = Math.abs(a - b);
    const finite = Number.isFinite(a) && Number.isFinite(b);
    if (finite ? error <= bound : Object.is(a, b)) continue;
    count++;
    if (bad.length < SHOWN) bad.push(`  [${i}] got ${a}, expected ${b}`);
    const excess = finite ? error / bound : Number.POSITIVE_INFINITY;
    if (excess > worst) {
      worst = excess;
      worstIndex = i;
    }
  }
  if (count === 0) return;
  throw new Error(
    [
      `${what}: ${count} of ${got.length} elements differ by more than ` +
        `${tolerance.relative} relative + ${tolerance.absolute} (${tolerance.reason})`,
      ...bad,
      `  worst at [${worstIndex}]: got ${got[worstIndex]}, expected ${want[worstIndex]}, ` +
        `${worst.toPrecision(3)} times the bound`,
    ].join('\n'),
  );
}

/** Throws unless both arrays hold the same bytes. */
export function assertBitwise(got: ArrayBufferView, want: ArrayBufferView, what = 'value'): void {
  const a = new Uint8Array(got.buffer, got.byteOffset, got.byteLength);
  const b = new Uint8Array(want.buffer, want.byteOffset, want.byteLength);
  if (a.length === b.length && Buffer.compare(a, b) === 0) return;
  if (a.length !== b.length) {
    throw new Error(`${what}: expected ${b.length} bytes, got ${a.length}`);
  }
  const size = (got as unknown as { BYTES_PER_ELEMENT?: number }).BYTES_PER_ELEMENT ?? 1;
  const index = Math.floor(a.findIndex((byte, i) => byte !== b[i]) / size);
  const at = (array: ArrayBufferView) => (array as unknown as ArrayLike<number>)[index];
  throw new Error(
    `${what}: first differs at [${index}]: got ${at(got)}, expected ${at(want)} exactly`,
  );
}

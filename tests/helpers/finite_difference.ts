/**
 * Gradient of `fn` at `at` by central differences, in double precision: the error is about
 * step^2 * f''' / 6 + 1e-16 |f| / step.
 */
export function finiteDifference(
  fn: (x: Float64Array) => number,
  at: ArrayLike<number>,
  step = 1e-5,
): Float64Array {
  const x = Float64Array.from(at);
  return Float64Array.from(x, (center, i) => {
    const h = step * Math.max(1, Math.abs(center));
    x[i] = center + h;
    const above = fn(x);
    x[i] = center - h;
    const below = fn(x);
    x[i] = center;
    return (above - below) / (2 * h);
  });
}

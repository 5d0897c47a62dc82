/** Reference of the KL term of policy_loss, in float64: value, and slopes for the gradient. */
import type { Frozen } from './policy_loss_frozen.ts';
import type { Batch, Settings } from './policy_loss_settings.ts';

const clip = (x: number, low: number, high: number) => Math.min(Math.max(x, low), high);

/** The plain estimator of d = ref − current, and its derivative by d. */
function klOf(estimator: Settings['klEstimator'], d: number): { value: number; slope: number } {
  switch (estimator) {
    case 'k1':
      return { value: -d, slope: -1 };
    case 'abs':
      return { value: Math.abs(d), slope: Math.sign(d) };
    case 'k2':
      return { value: (d * d) / 2, slope: d };
    case 'k3':
      return { value: Math.expm1(d) - d, slope: Math.expm1(d) };
  }
}

export const orNone = (bound: number) => (bound > 0 ? bound : Number.POSITIVE_INFINITY);

function klValue(s: Settings, d: number, rho: number): number {
  const k = klOf(
    s.klEstimator,
    clip(d, -orNone(s.klLogRatioClamp), orNone(s.klLogRatioClamp)),
  ).value;
  const bound = orNone(s.klClamp);
  if (!s.klImportanceWeighted) return clip(k, -bound, bound);
  return s.klClampWeighted ? clip(rho * k, -bound, bound) : rho * clip(k, -bound, bound);
}

/** The KL estimate of a token, with its importance weight. */
export function klAt(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  t: number,
  live: ArrayLike<number>,
  rho: number,
): number {
  const ref = batch.refLogprobs?.[t] as number;
  if (!s.klStraightThrough) return klValue(s, ref - (live[t] as number), rho);
  // sg(value) + weight·(k2 − sg(k2)): the value of the estimator, the gradient of k2.
  const constant = frozen.ratio[t] as number;
  const now = ref - (live[t] as number);
  const then = ref - (frozen.detached[t] as number);
  const weight = s.klImportanceWeighted ? constant : 1;
  return klValue(s, then, constant) + weight * ((now * now) / 2 - (then * then) / 2);
}

/** ∂kl/∂ℓ at a constant ρ, and ∂kl/∂ρ. */
export function klSlope(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  t: number,
): { dl: number; drho: number } {
  const rho = frozen.ratio[t] as number;
  const d = (batch.refLogprobs?.[t] as number) - (frozen.detached[t] as number);
  if (s.klStraightThrough) return { dl: (s.klImportanceWeighted ? rho : 1) * -d, drho: 0 };
  const inner = orNone(s.klLogRatioClamp);
  const bound = orNone(s.klClamp);
  const k = klOf(s.klEstimator, clip(d, -inner, inner));
  const slope = Math.abs(d) > inner ? 0 : -k.slope;
  if (!s.klImportanceWeighted) return { dl: Math.abs(k.value) > bound ? 0 : slope, drho: 0 };
  if (s.klClampWeighted) {
    const stuck = Math.abs(rho * k.value) > bound;
    return stuck ? { dl: 0, drho: 0 } : { dl: rho * slope, drho: k.value };
  }
  const dl = Math.abs(k.value) > bound ? 0 : rho * slope;
  return { dl, drho: clip(k.value, -bound, bound) };
}

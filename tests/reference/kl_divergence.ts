/** KL in double precision, straight from the formulas of native/include/vlm_grpo/kl_divergence.h. */

export interface EstimateSettings {
  estimator: 'k1' | 'abs' | 'k2' | 'k3';
  straightThrough?: boolean;
  /** 0: none, as in the op. */
  inputClamp?: number;
  outputClamp?: number;
  ratioClamp?: number;
  weightGradient?: boolean;
  clampWeighted?: boolean;
}

const limit = (x: number, bound = 0) => (bound === 0 ? x : Math.min(bound, Math.max(-bound, x)));
const inside = (x: number, bound = 0) => bound === 0 || Math.abs(x) <= bound;

function formula(estimator: EstimateSettings['estimator'], d: number): [number, number] {
  switch (estimator) {
    case 'k1':
      return [-d, 1];
    case 'abs':
      return [Math.abs(d), -Math.sign(d)];
    case 'k2':
      return [(d * d) / 2, -d];
    case 'k3':
      return [k3(d), -Math.expm1(d)];
  }
}

/** e^d - 1 - d; the series where the difference would cancel. */
function k3(d: number): number {
  if (Math.abs(d) > 0.1) return Math.expm1(d) - d;
  let term = (d * d) / 2;
  let sum = 0;
  for (let n = 3; n < 20; n++) {
    sum += term;
    term *= d / n;
  }
  return sum;
}

/** Value of one token's estimate and its derivative with respect to logp. */
export function estimate(
  logp: number,
  refLogp: number,
  oldLogp: number | undefined,
  settings: EstimateSettings,
): { value: number; gradient: number } {
  const { estimator, inputClamp, outputClamp } = settings;
  const d = refLogp - logp;
  let [value, gradient] = formula(estimator, limit(d, inputClamp));
  if (!inside(d, inputClamp)) gradient = 0;
  const clampOutput = () => {
    if (!inside(value, outputClamp)) gradient = 0;
    value = limit(value, outputClamp);
  };
  if (oldLogp === undefined) {
    clampOutput();
    return { value, gradient: settings.straightThrough ? -d : gradient };
  }
  const delta = logp - oldLogp;
  const rho = Math.exp(limit(delta, settings.ratioClamp));
  const through = settings.weightGradient !== false && inside(delta, settings.ratioClamp) ? 1 : 0;
  if (!settings.clampWeighted) clampOutput();
  gradient = rho * gradient + through * rho * value;
  value *= rho;
  if (settings.clampWeighted) clampOutput();
  return { value, gradient: settings.straightThrough ? rho * -d : gradient };
}

export interface Transform {
  temperature?: number;
  logitScale?: number;
  softcap?: number;
}

export function transform(x: ArrayLike<number>, t: Transform): Float64Array {
  const { temperature = 1, logitScale = 1, softcap = 0 } = t;
  return Float64Array.from(x, (value) => {
    const u = value * logitScale;
    return (softcap === 0 ? u : softcap * Math.tanh(u / softcap)) / temperature;
  });
}

export function logSumExp(z: ArrayLike<number>): number {
  const values = Array.from(z);
  const top = values.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  if (top === Number.NEGATIVE_INFINITY) return top;
  return top + Math.log(values.reduce((sum, value) => sum + Math.exp(value - top), 0));
}

function sum(count: number, term: (v: number) => number): number {
  let total = 0;
  for (let v = 0; v < count; v++) total += term(v);
  return total;
}

/** KL(p || q) from log-probs; terms with p = 0 are skipped. */
function kl(logP: Float64Array, logQ: Float64Array): number {
  return sum(logP.length, (v) => {
    const a = logP[v] as number;
    return a === Number.NEGATIVE_INFINITY ? 0 : Math.exp(a) * (a - (logQ[v] as number));
  });
}

export function divergence(
  zP: Float64Array,
  zQ: Float64Array,
  direction: 'forward' | 'reverse' | 'mixture',
  beta = 0.5,
): number {
  const lseP = logSumExp(zP);
  const lseQ = logSumExp(zQ);
  const logP = zP.map((z) => z - lseP);
  const logQ = zQ.map((z) => z - lseQ);
  if (direction === 'forward') return kl(logP, logQ);
  if (direction === 'reverse') return kl(logQ, logP);
  const logM = logP.map((a, v) =>
    Math.log(beta * Math.exp(a) + (1 - beta) * Math.exp(logQ[v] as number)),
  );
  return beta * kl(logP, logM) + (1 - beta) * kl(logQ, logM);
}

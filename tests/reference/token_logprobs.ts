/** token_logprobs in float64, from the formulas in native/include/vlm_grpo/token_logprobs.h. */

export interface TokenLogprobsReferenceInput {
  /** Row-major [rows, vocab]. */
  readonly logits: ArrayLike<number>;
  /** [rows, K]. */
  readonly ids: ArrayLike<number>;
  readonly rows: number;
  readonly vocab: number;
  /** A number, or one per row. */
  readonly temperature?: number | ArrayLike<number>;
  readonly logitScale?: number;
  readonly softcap?: number;
  readonly ignoreIndex?: number;
  /** [rows, vocab]: 0 drops an id. */
  readonly keepMask?: ArrayLike<number>;
}

export interface TokenLogprobsReference {
  readonly logprobs: Float64Array;
  readonly entropy: Float64Array;
  readonly lse: Float64Array;
  readonly sumP2: Float64Array;
}

interface Row {
  readonly z: Float64Array;
  /** dz_v / dx_v. */
  readonly slope: Float64Array;
  readonly p: Float64Array;
  readonly lse: number;
  readonly entropy: number;
  readonly sumP2: number;
}

function rowOf(input: TokenLogprobsReferenceInput, n: number): Row {
  const { logits, vocab, temperature = 1, logitScale = 1, softcap = 0, keepMask } = input;
  const tau = typeof temperature === 'number' ? temperature : (temperature[n] as number);
  const z = new Float64Array(vocab);
  const slope = new Float64Array(vocab);
  for (let v = 0; v < vocab; v++) {
    const at = n * vocab + v;
    const scaled = logitScale * (logits[at] as number);
    const tanh = softcap === 0 ? 0 : Math.tanh(scaled / softcap);
    const kept = keepMask === undefined || keepMask[at] !== 0;
    z[v] = kept ? (softcap === 0 ? scaled : softcap * tanh) / tau : Number.NEGATIVE_INFINITY;
    slope[v] = ((softcap === 0 ? 1 : 1 - tanh * tanh) * logitScale) / tau;
  }
  const bad = z.some((value) => Number.isNaN(value) || value === Number.POSITIVE_INFINITY);
  if (bad) {
    const nan = new Float64Array(vocab).fill(Number.NaN);
    return { z, slope, p: nan, lse: Number.NaN, entropy: Number.NaN, sumP2: Number.NaN };
  }
  const top = z.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  if (top === Number.NEGATIVE_INFINITY) {
    return { z, slope, p: new Float64Array(vocab), lse: top, entropy: 0, sumP2: 0 };
  }
  let sum = 0;
  for (const value of z) sum += Math.exp(value - top);
  const lse = top + Math.log(sum);
  const p = z.map((value) => Math.exp(value - top) / sum);
  let entropy = 0;
  let sumP2 = 0;
  for (let v = 0; v < vocab; v++) {
    const pv = p[v] as number;
    // An id of probability 0 adds nothing to either sum: the limit of p log p.
    if (pv > 0) entropy -= pv * ((z[v] as number) - top - Math.log(sum));
    sumP2 += pv * pv;
  }
  return { z, slope, p, lse, entropy, sumP2 };
}

function idsOf(input: TokenLogprobsReferenceInput, n: number): { ids: number[]; ignored: boolean } {
  const count = input.rows === 0 ? 0 : input.ids.length / input.rows;
  const ids = Array.from({ length: count }, (_, k) => input.ids[n * count + k] as number);
  const { ignoreIndex = -100 } = input;
  return { ids, ignored: count > 0 && ids.every((id) => id === ignoreIndex) };
}

export function tokenLogprobsReference(input: TokenLogprobsReferenceInput): TokenLogprobsReference {
  const { rows, ignoreIndex = -100 } = input;
  const out = {
    logprobs: new Float64Array(input.ids.length),
    entropy: new Float64Array(rows),
    lse: new Float64Array(rows),
    sumP2: new Float64Array(rows),
  };
  for (let n = 0; n < rows; n++) {
    const { ids, ignored } = idsOf(input, n);
    if (ignored) continue;
    const row = rowOf(input, n);
    out.lse[n] = row.lse;
    out.entropy[n] = row.entropy;
    out.sumP2[n] = row.sumP2;
    for (const [k, id] of ids.entries()) {
      // A row without mass has log-prob -inf everywhere; -inf - -inf would be NaN.
      const mass = row.lse !== Number.NEGATIVE_INFINITY;
      const logprob = mass ? (row.z[id] as number) - row.lse : row.lse;
      out.logprobs[n * ids.length + k] = id === ignoreIndex ? 0 : logprob;
    }
  }
  return out;
}

export interface TokenLogprobsUpstream {
  /** [rows, K]. */
  readonly gradLogprobs?: ArrayLike<number>;
  readonly gradEntropy?: ArrayLike<number>;
  readonly gradLse?: ArrayLike<number>;
}

/** Gradient with respect to the logits, row-major [rows, vocab]. */
export function tokenLogprobsBackwardReference(
  input: TokenLogprobsReferenceInput,
  upstream: TokenLogprobsUpstream,
): Float64Array {
  const { rows, vocab, ignoreIndex = -100 } = input;
  const dlogits = new Float64Array(rows * vocab);
  for (let n = 0; n < rows; n++) {
    const { ids, ignored } = idsOf(input, n);
    if (ignored) continue;
    const { z, slope, p, lse, entropy } = rowOf(input, n);
    const dz = new Float64Array(vocab);
    let total = 0;
    for (const [k, id] of ids.entries()) {
      if (id === ignoreIndex || z[id] === Number.NEGATIVE_INFINITY) continue;
      const g = (upstream.gradLogprobs?.[n * ids.length + k] ?? 0) as number;
      dz[id] = (dz[id] as number) + g;
      total += g;
    }
    const gradEntropy = (upstream.gradEntropy?.[n] ?? 0) as number;
    const gradLse = (upstream.gradLse?.[n] ?? 0) as number;
    for (let v = 0; v < vocab; v++) {
      const pv = p[v] as number;
      let value = (dz[v] as number) + pv * (gradLse - total);
      if (pv > 0) value -= gradEntropy * pv * ((z[v] as number) - lse + entropy);
      dlogits[n * vocab + v] = pv === 0 && dz[v] === 0 ? 0 : value * (slope[v] as number);
    }
  }
  return dlogits;
}

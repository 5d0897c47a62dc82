/**
 * linear_logprobs in double precision, straight from the formulas: the whole logits matrix, then
 * log-softmax row by row, then the two matrix products of the chain rule.
 */

export interface LinearProblem {
  /** [N, H], [V, H], [V]. */
  readonly hidden: ArrayLike<number>;
  readonly weight: ArrayLike<number>;
  readonly bias?: ArrayLike<number> | undefined;
  readonly rows: number;
  readonly width: number;
  readonly vocab: number;
  /** [N, K]. */
  readonly ids: ArrayLike<number>;
  readonly ignoreIndex?: number | undefined;
  /** One number, or one per row. */
  readonly temperature?: number | ArrayLike<number> | undefined;
  readonly logitScale?: number | undefined;
  readonly softcap?: number | undefined;
}

export interface LinearUpstream {
  readonly gradLogprobs?: ArrayLike<number> | undefined;
  readonly gradEntropy?: ArrayLike<number> | undefined;
  readonly gradLse?: ArrayLike<number> | undefined;
}

interface Row {
  readonly ignored: boolean;
  /** z and dz/dx of each id. */
  readonly z: Float64Array;
  readonly slope: Float64Array;
  readonly lse: number;
}

function rowOf(problem: LinearProblem, n: number): Row {
  const { width, vocab, temperature = 1, logitScale = 1, softcap = 0 } = problem;
  const tau = typeof temperature === 'number' ? temperature : (temperature[n] as number);
  const z = new Float64Array(vocab);
  const slope = new Float64Array(vocab);
  const perRow = problem.ids.length / problem.rows;
  const ids = Array.from({ length: perRow }, (_, k) => problem.ids[n * perRow + k] as number);
  if (ids.every((id) => id === (problem.ignoreIndex ?? -100))) {
    return { ignored: true, z, slope, lse: 0 };
  }
  for (let v = 0; v < vocab; v++) {
    let x = problem.bias?.[v] ?? 0;
    for (let h = 0; h < width; h++) {
      x += (problem.hidden[n * width + h] as number) * (problem.weight[v * width + h] as number);
    }
    const scaled = logitScale * x;
    const tanh = softcap === 0 ? 0 : Math.tanh(scaled / softcap);
    z[v] = (softcap === 0 ? scaled : softcap * tanh) / tau;
    slope[v] = (logitScale * (1 - tanh * tanh)) / tau;
  }
  const max = z.reduce((a, b) => (Number.isNaN(b) ? b : Math.max(a, b)), Number.NEGATIVE_INFINITY);
  if (max === Number.NEGATIVE_INFINITY) return { ignored: false, z, slope, lse: max };
  const lse = max + Math.log(z.reduce((sum, value) => sum + Math.exp(value - max), 0));
  return { ignored: false, z, slope, lse };
}

const probability = (row: Row, v: number) =>
  row.lse === Number.NEGATIVE_INFINITY ? 0 : Math.exp((row.z[v] as number) - row.lse);

function entropyOf(row: Row): number {
  let entropy = 0;
  for (let v = 0; v < row.z.length; v++) {
    const p = probability(row, v);
    if (p !== 0) entropy -= p * ((row.z[v] as number) - row.lse);
  }
  return entropy;
}

/** Values, and gradients for the given upstream gradients. */
export function linearLogprobsReference(problem: LinearProblem, upstream: LinearUpstream = {}) {
  const { rows, width, vocab, ids, ignoreIndex = -100 } = problem;
  const perRow = ids.length / rows;
  const logprobs = new Float64Array(ids.length);
  const entropy = new Float64Array(rows);
  const lse = new Float64Array(rows);
  const sumP2 = new Float64Array(rows);
  const dhidden = new Float64Array(rows * width);
  const dweight = new Float64Array(vocab * width);
  const dbias = new Float64Array(vocab);
  for (let n = 0; n < rows; n++) {
    const row = rowOf(problem, n);
    if (row.ignored) continue;
    lse[n] = row.lse;
    entropy[n] = entropyOf(row);
    const dz = new Float64Array(vocab);
    for (let v = 0; v < vocab; v++) {
      const p = probability(row, v);
      sumP2[n] = (sumP2[n] as number) + p * p;
      if (p === 0) continue;
      const log = (row.z[v] as number) - row.lse;
      dz[v] =
        (upstream.gradLse?.[n] ?? 0) * p -
        (upstream.gradEntropy?.[n] ?? 0) * p * (log + (entropy[n] as number));
    }
    for (let i = n * perRow; i < (n + 1) * perRow; i++) {
      const id = ids[i] as number;
      if (id === ignoreIndex) continue;
      const z = row.z[id] as number;
      logprobs[i] = row.lse === Number.NEGATIVE_INFINITY ? row.lse : z - row.lse;
      const g = upstream.gradLogprobs?.[i] ?? 0;
      if (g === 0 || row.lse === Number.NEGATIVE_INFINITY) continue;
      for (let v = 0; v < vocab; v++) {
        dz[v] = (dz[v] as number) + g * ((v === id ? 1 : 0) - probability(row, v));
      }
    }
    for (let v = 0; v < vocab; v++) {
      const dx = (dz[v] as number) * (row.slope[v] as number);
      if (dx === 0) continue;
      dbias[v] = (dbias[v] as number) + dx;
      for (let h = 0; h < width; h++) {
        const at = n * width + h;
        const w = v * width + h;
        dhidden[at] = (dhidden[at] as number) + dx * (problem.weight[w] as number);
        dweight[w] = (dweight[w] as number) + dx * (problem.hidden[at] as number);
      }
    }
  }
  return { logprobs, entropy, lse, sumP2, dhidden, dweight, dbias };
}

/** The scalar whose gradients the upstream gradients make, for finite differences. */
export function linearLogprobsObjective(problem: LinearProblem, upstream: LinearUpstream): number {
  const { logprobs, entropy, lse } = linearLogprobsReference(problem);
  const dot = (a: ArrayLike<number>, b?: ArrayLike<number>) =>
    b === undefined ? 0 : Array.from(a).reduce((sum, x, i) => sum + x * (b[i] as number), 0);
  return (
    dot(logprobs, upstream.gradLogprobs) +
    dot(entropy, upstream.gradEntropy) +
    dot(lse, upstream.gradLse)
  );
}

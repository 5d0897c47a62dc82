/**
 * Sampling by sorting the whole vocabulary, in double precision, straight from the definitions of
 * native/include/vlm_grpo/sample_tokens.h.
 */

export interface SampleSettings {
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  minPFirst?: boolean;
  topPOfAll?: boolean;
  previousIds?: Iterable<number>;
  bannedIds?: Iterable<number>;
  allowed?: ArrayLike<number> | undefined;
}

export interface Distribution {
  /** Ids that are left, ascending. */
  readonly kept: number[];
  /** Probability of each id of the vocabulary; 0 where not kept. */
  readonly probabilities: Float64Array;
  /** How far the closest filter decision was from going the other way, in probability. */
  readonly margin: number;
}

/** What the op draws from. z is an f32 number by definition. */
export function distribution(logits: ArrayLike<number>, s: SampleSettings): Distribution {
  const x = Float64Array.from(logits);
  const penalty = s.repetitionPenalty ?? 1;
  for (const id of new Set(s.previousIds ?? [])) {
    const value = x[id] as number;
    x[id] = Math.fround(value > 0 ? value / penalty : value * penalty);
  }
  for (const id of s.bannedIds ?? []) x[id] = Number.NEGATIVE_INFINITY;
  x.forEach((_, v) => {
    if (s.allowed?.[v] === 0) x[v] = Number.NEGATIVE_INFINITY;
  });
  const temperature = s.temperature ?? 1;
  const z = x.map((value) =>
    Math.fround(value / (temperature === 0 ? 1 : Math.fround(temperature))),
  );

  // Best first: z descending, then id ascending.
  const ranked = Array.from(z.keys())
    .filter((v) => z[v] !== Number.NEGATIVE_INFINITY)
    .sort((a, b) => (z[b] as number) - (z[a] as number) || a - b);
  const top = z[ranked[0] as number] as number;
  const weight = (v: number) => Math.exp((z[v] as number) - top);
  const mass = (ids: number[]) => ids.reduce((sum, v) => sum + weight(v), 0);
  let margin = 1;
  let left = ranked;
  if (temperature === 0) left = ranked.slice(0, 1);

  const all = mass(ranked);
  const topK = s.topK ?? 0;
  if (topK > 0) left = left.slice(0, topK);
  const applyMinP = () => {
    if ((s.minP ?? 0) === 0) return;
    const lowest = Math.log(s.minP as number);
    left = left.filter((v) => {
      const distance = (z[v] as number) - top - lowest;
      margin = Math.min(margin, Math.abs(distance));
      return distance >= 0;
    });
  };
  if (s.minPFirst) applyMinP();
  if ((s.topP ?? 1) < 1) {
    const total = s.topPOfAll ? all : mass(left);
    let before = 0;
    left = left.filter((v) => {
      const reached = before / total;
      margin = Math.min(margin, Math.abs(reached - (s.topP as number)));
      before += weight(v);
      return reached < (s.topP as number);
    });
  }
  if (!s.minPFirst) applyMinP();

  const kept = left.toSorted((a, b) => a - b);
  const total = mass(kept);
  const probabilities = new Float64Array(z.length);
  for (const v of kept) probabilities[v] = weight(v) / total;
  return { kept, probabilities, margin };
}

/** Philox4x32-10, with big integers. */
export function philox(counter: readonly number[], key: readonly number[]): number[] {
  let [c0, c1, c2, c3] = counter.map(BigInt) as [bigint, bigint, bigint, bigint];
  let [k0, k1] = key.map(BigInt) as [bigint, bigint];
  const mask = 0xffffffffn;
  for (let round = 0; round < 10; round++) {
    const a = 0xd2511f53n * c0;
    const b = 0xcd9e8d57n * c2;
    [c0, c1, c2, c3] = [(b >> 32n) ^ c1 ^ k0, b & mask, (a >> 32n) ^ c3 ^ k1, a & mask];
    k0 = (k0 + 0x9e3779b9n) & mask;
    k1 = (k1 + 0xbb67ae85n) & mask;
  }
  return [c0, c1, c2, c3].map(Number);
}

/** The draw: inverts the cumulative distribution in index order. */
export function draw(d: Distribution, seed: number, stream: number, position: number): number {
  const bits = philox(
    [position >>> 0, 0, stream >>> 0, 0],
    [Number(BigInt.asUintN(32, BigInt(seed))), Number(BigInt.asUintN(32, BigInt(seed) >> 32n))],
  ) as [number, number, number, number];
  const u = (bits[1] * 2 ** 32 + bits[0]) / 2 ** 64;
  let cumulative = 0;
  for (const v of d.kept) {
    cumulative += d.probabilities[v] as number;
    if (cumulative > u) return v;
  }
  return d.kept.at(-1) as number;
}

/** log softmax(x / temperature) and its entropy. */
export function logSoftmax(logits: ArrayLike<number>, temperature = 1) {
  const z = Float64Array.from(logits, (x) => x / temperature);
  const top = z.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const lse = top + Math.log(z.reduce((sum, value) => sum + Math.exp(value - top), 0));
  const logprobs = z.map((value) => value - lse);
  const entropy = logprobs.reduce(
    (h, l) => (l === Number.NEGATIVE_INFINITY ? h : h - Math.exp(l) * l),
    0,
  );
  return { logprobs, entropy };
}

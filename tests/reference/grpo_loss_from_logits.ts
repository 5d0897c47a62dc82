/**
 * Reference of grpo_loss_from_logits in float64: soft-max of every row, the reference of the policy
 * loss on the log-probs, and the chain rule back to the logits.
 */
import { lossAt, policyLossReference, type Reference } from './policy_loss.ts';
import type { Batch, Settings } from './policy_loss_settings.ts';

export interface LogitsTransform {
  readonly temperature?: number | ArrayLike<number>;
  readonly logitScale?: number;
  readonly softcap?: number;
}

export interface LogitsBatch extends Omit<Batch, 'logprobs' | 'entropy' | 'refLogprobs'> {
  readonly logits: ArrayLike<number>;
  readonly refLogits?: ArrayLike<number>;
  readonly refLogprobs?: ArrayLike<number>;
  readonly ids: ArrayLike<number>;
  readonly vocab: number;
  readonly transform?: LogitsTransform;
}

interface Row {
  /** log p_v */
  readonly logp: Float64Array;
  /** d z_v / d x_v */
  readonly slope: Float64Array;
  readonly entropy: number;
}

function readRow(logits: ArrayLike<number>, n: number, batch: LogitsBatch): Row {
  const { vocab, transform = {} } = batch;
  const { temperature = 1, logitScale = 1, softcap = 0 } = transform;
  const tau = typeof temperature === 'number' ? temperature : (temperature[n] as number);
  const z = new Float64Array(vocab);
  const slope = new Float64Array(vocab);
  for (let v = 0; v < vocab; v++) {
    const u = logitScale * (logits[n * vocab + v] as number);
    const t = softcap === 0 ? 0 : Math.tanh(u / softcap);
    z[v] = (softcap === 0 ? u : softcap * t) / tau;
    slope[v] = (logitScale * (1 - t * t)) / tau;
  }
  const top = z.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const lse = top + Math.log(z.reduce((sum, value) => sum + Math.exp(value - top), 0));
  const logp = z.map((value) => value - lse);
  const entropy = logp.reduce(
    (sum, l) => (l === Number.NEGATIVE_INFINITY ? sum : sum - Math.exp(l) * l),
    0,
  );
  return { logp, slope, entropy };
}

const masked = (batch: LogitsBatch, n: number) =>
  (batch.completionMask?.[n] ?? 1) !== 0 && (batch.toolMask?.[n] ?? 1) !== 0;

/** Log-probs of the ids and entropies; 0 where the mask is 0. */
function scores(batch: LogitsBatch, logits: ArrayLike<number>) {
  const logprobs = new Float64Array(batch.ids.length);
  const entropy = new Float64Array(batch.ids.length);
  for (let n = 0; n < batch.ids.length; n++) {
    if (!masked(batch, n)) continue;
    const row = readRow(logits, n, batch);
    logprobs[n] = row.logp[batch.ids[n] as number] as number;
    entropy[n] = row.entropy;
  }
  return { logprobs, entropy };
}

/** The batch of policy_loss that the logits stand for. */
export function policyBatch(batch: LogitsBatch): Batch {
  const { logits, refLogits, refLogprobs, ...rest } = batch;
  const reference = refLogits === undefined ? refLogprobs : scores(batch, refLogits).logprobs;
  return {
    ...rest,
    ...scores(batch, logits),
    ...(reference !== undefined && { refLogprobs: reference }),
  };
}

export interface LogitsReference extends Reference {
  readonly logprobs: ArrayLike<number>;
  readonly entropy: ArrayLike<number>;
  readonly dlogits: Float64Array;
}

export function grpoLossFromLogitsReference(batch: LogitsBatch, s: Settings): LogitsReference {
  const policy = policyBatch(batch);
  const result = policyLossReference(policy, s);
  const { vocab, ids } = batch;
  const dlogits = new Float64Array(batch.logits.length);
  for (let n = 0; n < ids.length; n++) {
    if (!masked(batch, n)) continue;
    const { logp, slope, entropy } = readRow(batch.logits, n, batch);
    const g = result.dlogprobs[n] as number;
    const h = s.entropyCoef === 0 ? 0 : (result.dentropy[n] as number);
    for (let v = 0; v < vocab; v++) {
      const l = logp[v] as number;
      const p = Math.exp(l);
      const dz = g * ((v === ids[n] ? 1 : 0) - p) - (p === 0 ? 0 : h * p * (l + entropy));
      dlogits[n * vocab + v] = dz * (slope[v] as number);
    }
  }
  return { ...result, logprobs: policy.logprobs, entropy: policy.entropy ?? [], dlogits };
}

/** The loss at other logits, with everything behind a stop-gradient frozen at the batch's own. */
export function lossAtLogits(
  batch: LogitsBatch,
  s: Settings,
  reference: LogitsReference,
  logits: ArrayLike<number>,
): number {
  const { logprobs, entropy } = scores(batch, logits);
  return lossAt(policyBatch(batch), s, reference.frozen, logprobs, entropy);
}

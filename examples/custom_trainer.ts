// A trainer in one file, made of ops only: GRPO on a linear policy that has to learn a lookup table.
// A prompt is one of 12 "images" (a random vector each); the answer that pays is one of 10 tokens.
//
//   npx tsx examples/custom_trainer.ts
import {
  groupAdvantagesSync,
  linearLogprobsBackwardSync,
  linearLogprobsSync,
  policyLossSync,
  sampleTokensSync,
} from '../lib/index.ts';

const [images, width, vocab, group, steps, learningRate] = [12, 16, 10, 16, 150, 2];
const samples = images * group;

let state = 1;
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};
const features = Array.from({ length: images }, () =>
  Array.from({ length: width }, () => random() * 2 - 1),
);
const answers = Array.from({ length: images }, () => Math.floor(random() * vocab));
// A row per sample: each image is answered `group` times.
const hidden = Float32Array.from(
  features.flatMap((row) => Array.from({ length: group }, () => row)).flat(),
);
const expected = answers.flatMap((answer) => Array.from({ length: group }, () => answer));

let weight = new Float32Array(vocab * width); // the policy: logits = hidden · weightᵀ

const dot = (n: number, v: number) =>
  hidden
    .subarray(n * width, (n + 1) * width)
    .reduce((sum, x, h) => sum + x * (weight[v * width + h] ?? 0), 0);

for (let step = 0; step <= steps; step++) {
  // Rollout: a group of answers per image, and their rewards.
  const logits = Float32Array.from({ length: samples * vocab }, (_, i) =>
    dot(Math.floor(i / vocab), i % vocab),
  );
  const { ids } = sampleTokensSync(
    { logits: { data: logits, shape: [samples, vocab] } },
    { seed: step },
  );
  const rewards = Float32Array.from(ids, (id, n) => (id === expected[n] ? 1 : 0));

  // Advantages within each group, loss, gradient.
  const { advantages, metrics } = groupAdvantagesSync(
    { rewards },
    { numGenerations: group, metrics: true },
  );
  const policy = {
    hidden: { data: hidden, shape: [samples, width] },
    weight: { data: weight, shape: [vocab, width] },
    ids,
  };
  const { logprobs, lse } = linearLogprobsSync(policy);
  const { loss, dlogprobs } = policyLossSync({
    logprobs: { data: logprobs, shape: [samples, 1] },
    advantages,
  });
  if (dlogprobs === undefined) throw new Error('policyLoss computes gradients by default');
  const { dweight } = linearLogprobsBackwardSync(
    { ...policy, lse, gradLogprobs: dlogprobs },
    { dhidden: false },
  );

  // A step of plain gradient descent.
  weight = weight.map((w, i) => w - learningRate * (dweight[i] ?? 0));

  if (step % 30 === 0) {
    console.log(`step ${step}: reward ${metrics.reward.toFixed(3)}, loss ${loss.toFixed(4)}`);
  }
  if (step === steps && metrics.reward < 0.8) process.exitCode = 1;
}

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

// Features of the images, a row per sample (each image is sampled `group` times), and the answers.
let state = 1;
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};
const features = Float32Array.from({ length: images * width }, () => random() * 2 - 1);
const answers = Int32Array.from({ length: images }, () => Math.floor(random() * vocab));
const hidden = Float32Array.from(
  { length: samples * width },
  (_, i) => features[Math.floor(i / width / group) * width + (i % width)] as number,
);
const weight = new Float32Array(vocab * width); // the policy: logits = hidden · weightᵀ

for (let step = 0; step <= steps; step++) {
  // Rollout: a group of answers per image.
  const logits = new Float32Array(samples * vocab);
  for (let n = 0; n < samples; n++) {
    for (let v = 0; v < vocab; v++) {
      for (let h = 0; h < width; h++) {
        logits[n * vocab + v]! += hidden[n * width + h]! * weight[v * width + h]!;
      }
    }
  }
  const { ids } = sampleTokensSync({ logits: { data: logits, shape: [samples, vocab] } }, { seed: step });

  // Rewards, advantages within each group, loss, gradient, and a step of plain gradient descent.
  const rewards = Float32Array.from(ids, (id, n) => (id === answers[Math.floor(n / group)] ? 1 : 0));
  const { advantages, metrics } = groupAdvantagesSync({ rewards }, { numGenerations: group });
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
  const { dweight } = linearLogprobsBackwardSync({
    ...policy,
    lse,
    gradLogprobs: dlogprobs as Float32Array,
  });
  for (let i = 0; i < weight.length; i++) weight[i]! -= learningRate * (dweight as Float32Array)[i]!;

  if (step % 30 === 0) {
    console.log(`step ${step}: reward ${metrics['reward']?.toFixed(3)}, loss ${loss.toFixed(4)}`);
  }
  if (step === steps && (metrics['reward'] ?? 0) < 0.8) process.exitCode = 1;
}

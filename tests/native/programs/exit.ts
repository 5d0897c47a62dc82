// Run by worker_threads.test.ts: ends while asynchronous ops run ("exit"), or lets the last of them
// keep the process alive until it is done ("drain").
import { Tensor, tokenLogprobs } from '../../../lib/index.ts';

const logits = Tensor.zeros([256, 100_000], 'f32');
const ids = new Int32Array(256);
for (let i = 0; i < 4; i++) {
  void tokenLogprobs({ logits, ids }).then(() => {
    if (process.argv[2] === 'drain') console.log('done');
  });
}
if (process.argv[2] === 'exit') process.exit(0);

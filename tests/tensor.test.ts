import { describe, expect, it } from 'vitest';
import { DTYPES } from '../lib/dtype.ts';
import {
  ArgumentError,
  DisposedError,
  DTypeError,
  OutOfMemoryError,
  ShapeError,
} from '../lib/errors.ts';
import { tokenLogprobsSync } from '../lib/ops/token_logprobs.ts';
import { emptyCache, memoryStats, Tensor, tidy } from '../lib/tensor.ts';

describe('Tensor.from', () => {
  it('copies every kind of array in and out', () => {
    const samples = [
      ['f32', Float32Array.of(1.5, -2, Number.NaN)],
      ['f64', Float64Array.of(Math.PI, -0)],
      ['i32', Int32Array.of(-(2 ** 31), 2 ** 31 - 1)],
      ['u8', Uint8Array.of(0, 255)],
      ['bf16', Uint16Array.of(0x3f80, 0xff80)],
      ['f16', Uint16Array.of(0x3c00, 0x7c00)],
    ] as const;
    for (const [dtype, data] of samples) {
      using tensor = Tensor.from(data, { dtype });
      const original = data.slice();
      data.fill(0);
      expect(tensor.toTypedArray()).toEqual(original);
      expect([tensor.dtype, tensor.size, tensor.shape]).toEqual([
        dtype,
        original.length,
        [original.length],
      ]);
    }
  });

  it('knows the dtype of an array, but not of a Uint16Array', () => {
    expect(Tensor.from(Int32Array.of(1)).dtype).toBe('i32');
    expect(() => Tensor.from(Uint16Array.of(1))).toThrow(
      new DTypeError('Could not tell the dtype of Uint16Array(1): pass { dtype }'),
    );
    expect(() => Tensor.from(new BigInt64Array(1))).toThrow(
      new DTypeError('Could not tell the dtype of BigInt64Array(1): vocabularies fit Int32Array'),
    );
    expect(() => Tensor.from(Float32Array.of(1), { dtype: 'bf16' })).toThrow(
      new DTypeError('Expected an array that holds bf16, received Float32Array(1)'),
    );
    expect(() => Tensor.from(Float32Array.of(1), { dtype: 'f8' as 'f32' })).toThrow(
      new DTypeError('Expected a dtype (f32, bf16, f16, f64, i32, u8), received "f8"'),
    );
  });

  it('takes plain numbers, as f32 unless told otherwise', () => {
    expect(Tensor.from([1, 2.5]).toTypedArray()).toEqual(Float32Array.of(1, 2.5));
    expect(Tensor.from([1, 2], { dtype: 'i32' }).toTypedArray()).toEqual(Int32Array.of(1, 2));
    expect(() => Tensor.from([1], { dtype: 'bf16' })).toThrow(
      new DTypeError('Expected a Uint16Array of raw bits for dtype bf16, received numbers'),
    );
  });

  it('copies views at an offset, of shared memory and of Buffers', () => {
    const shared = new Float32Array(new SharedArrayBuffer(16));
    shared.set([1, 2, 3, 4]);
    expect(Tensor.from(shared.subarray(1, 3)).toTypedArray()).toEqual(Float32Array.of(2, 3));
    expect(Tensor.from(Buffer.from([7, 8])).toTypedArray()).toEqual(Uint8Array.of(7, 8));
  });

  it('of a detached array is empty', () => {
    const data = new Float32Array(4);
    structuredClone(data.buffer, { transfer: [data.buffer] });
    expect(Tensor.from(data).shape).toEqual([0]);
    expect(() => Tensor.from(data, { shape: [4] })).toThrow(ShapeError);
  });

  it('checks the shape and keeps a frozen copy of it', () => {
    const shape = [2, 3];
    const tensor = Tensor.from(new Float32Array(6), { shape });
    shape[0] = 99;
    expect(tensor.shape).toEqual([2, 3]);
    expect(() => (tensor.shape as number[]).push(1)).toThrow(TypeError);
    expect(() => Tensor.from(new Float32Array(6), { shape: [4] })).toThrow(
      new ShapeError('Expected `shape` to have 6 elements, received [4]'),
    );
    for (const bad of [[-1], [1.5], [Number.NaN]]) {
      expect(() => Tensor.zeros(bad, 'f32')).toThrow(
        new ShapeError(`Expected \`shape\` of integers of at least 0, received [${bad.join()}]`),
      );
    }
  });

  it('takes shapes without elements, and scalars', () => {
    expect(Tensor.from(new Float32Array(0), { shape: [3, 0] }).toTypedArray().length).toBe(0);
    expect(Tensor.zeros([], 'f64').toTypedArray()).toEqual(Float64Array.of(0));
  });
});

describe('contents', () => {
  it('zeros are zero in every dtype, small and large', () => {
    for (const dtype of DTYPES) {
      for (const size of [1, 100, 3_000_000]) {
        using tensor = Tensor.zeros([size], dtype);
        expect(tensor.toTypedArray().every((value) => value === 0)).toBe(true);
      }
    }
  });

  it('set replaces them and checks dtype and length', () => {
    const tensor = Tensor.zeros([2], 'f32');
    expect(tensor.set(Float32Array.of(5, 6))).toBe(tensor);
    expect(tensor.toTypedArray()).toEqual(Float32Array.of(5, 6));
    expect(() => tensor.set(Float32Array.of(1))).toThrow(
      new ShapeError('Expected 2 elements, received 1'),
    );
    expect(() => tensor.set(Int32Array.of(1, 2))).toThrow(
      new DTypeError('Expected an array that holds f32, received Int32Array(2)'),
    );
  });

  it('more than there is memory for is an OutOfMemoryError', () => {
    // More than the address space of a process; it fails without trying to touch anything.
    expect(() => Tensor.empty([2 ** 46], 'f64')).toThrow(OutOfMemoryError);
  });

  it('the native handle refuses reads and writes outside of it', () => {
    const storage = Tensor.zeros([4], 'f32').storage();
    for (const offset of [4, -1, Number.NaN, 2 ** 60]) {
      expect(() => storage.write(new Float32Array(4), offset)).toThrow(
        'Expected a typed array within the 16 bytes of the tensor',
      );
      expect(() => storage.read(new Float32Array(4), offset)).toThrow('within the 16 bytes');
    }
    expect(() => storage.write([1] as unknown as Float32Array, 0)).toThrow(
      'Expected a typed array',
    );
  });
});

describe('lifetime', () => {
  it('dispose frees at once, and twice does nothing more', () => {
    const before = memoryStats();
    const tensor = Tensor.zeros([1000], 'f32');
    expect(memoryStats().liveBytes - before.liveBytes).toBe(4000);
    expect(memoryStats().liveTensors - before.liveTensors).toBe(1);
    expect(memoryStats().peakBytes).toBeGreaterThanOrEqual(memoryStats().liveBytes);
    tensor.dispose();
    tensor.dispose();
    expect(tensor.disposed).toBe(true);
    expect(memoryStats().liveBytes).toBe(before.liveBytes);
  });

  it('using disposes at the end of the block', () => {
    let outside: Tensor;
    {
      using tensor = Tensor.zeros([1], 'u8');
      outside = tensor;
      expect(tensor.disposed).toBe(false);
    }
    expect(outside.disposed).toBe(true);
  });

  it('use after dispose throws', () => {
    const tensor = Tensor.zeros([2, 3], 'bf16');
    tensor.dispose();
    const error = new DisposedError('The bf16 tensor of shape [2, 3] was disposed');
    expect(() => tensor.toTypedArray()).toThrow(error);
    expect(() => tensor.set(new Uint16Array(6))).toThrow(error);
    expect(() => tokenLogprobsSync({ logits: tensor, ids: Int32Array.of(0, 0) })).toThrow(error);
  });
});

describe('tidy', () => {
  it('disposes what was made inside, except what is returned, at any depth', () => {
    let inner: Tensor | undefined;
    const kept = tidy(() => {
      inner = Tensor.zeros([1], 'f32');
      return { list: [Tensor.zeros([2], 'f32')], deep: { one: Tensor.zeros([3], 'f32') } };
    });
    expect(inner?.disposed).toBe(true);
    expect([kept.list[0]?.disposed, kept.deep.one.disposed]).toEqual([false, false]);
  });

  it('nests: what the inner scope returns belongs to the outer one', () => {
    let passed: Tensor | undefined;
    tidy(() => {
      passed = tidy(() => Tensor.zeros([1], 'f32'));
      expect(passed.disposed).toBe(false);
    });
    expect(passed?.disposed).toBe(true);
  });

  it('disposes when the function throws, and leaves older tensors alone', () => {
    const older = Tensor.zeros([1], 'f32');
    let inner: Tensor | undefined;
    expect(() =>
      tidy(() => {
        inner = Tensor.zeros([1], 'f32');
        throw new Error('inside');
      }),
    ).toThrow('inside');
    expect([inner?.disposed, older.disposed]).toEqual([true, false]);
    expect(tidy(() => older).disposed).toBe(false);
  });

  it('refuses an asynchronous function', () => {
    expect(() => tidy(async () => Tensor.zeros([1], 'f32'))).toThrow(
      new ArgumentError('Expected tidy() to be given a synchronous function, received a promise'),
    );
  });

  it('sees tensors that ops make', () => {
    const before = memoryStats().liveTensors;
    tidy(() => {
      const logits = Tensor.zeros([4, 10], 'f32');
      tokenLogprobsSync({ logits, ids: new Int32Array(4) }, { entropy: true });
    });
    expect(memoryStats().liveTensors).toBe(before);
  });
});

describe('emptyCache', () => {
  it('gives back the large freed blocks that are kept for the next tensor of their size', () => {
    emptyCache();
    expect(memoryStats().cachedBytes).toBe(0);
    const size = 8 << 20;
    Tensor.zeros([size], 'u8').dispose();
    expect(memoryStats().cachedBytes).toBe(size);
    using again = Tensor.zeros([size - 5], 'u8');
    expect(memoryStats().cachedBytes).toBe(0);
    expect(again.toTypedArray().every((byte) => byte === 0)).toBe(true);
    Tensor.zeros([1000], 'u8').dispose();
    expect(memoryStats().cachedBytes).toBe(0);
    Tensor.zeros([size], 'u8').dispose();
    emptyCache();
    expect(memoryStats().cachedBytes).toBe(0);
  });
});

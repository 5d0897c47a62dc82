/** A small seeded generator: the same numbers on every machine. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = (seed * 0x9e3779b1 + 0x85ebca6b) >>> 0;
  }

  /** Uniform in [0, 1). */
  uniform(low = 0, high = 1): number {
    // mulberry32
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return low + (high - low) * (((t ^ (t >>> 14)) >>> 0) / 4294967296);
  }

  /** Normal with mean 0 and standard deviation `scale`. */
  normal(scale = 1): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return scale * radius * Math.cos(2 * Math.PI * this.uniform());
  }

  /** An integer in [0, n). */
  int(n: number): number {
    return Math.floor(this.uniform() * n);
  }

  normals(count: number, scale = 1): Float32Array {
    return Float32Array.from({ length: count }, () => this.normal(scale));
  }

  uniforms(count: number, low = 0, high = 1): Float32Array {
    return Float32Array.from({ length: count }, () => this.uniform(low, high));
  }

  ints(count: number, n: number): Int32Array {
    return Int32Array.from({ length: count }, () => this.int(n));
  }

  /** 0 / 1, with the given share of ones. */
  mask(count: number, share = 0.7): Uint8Array {
    return Uint8Array.from({ length: count }, () => (this.uniform() < share ? 1 : 0));
  }
}

/** Seeded, roughly normal numbers, fast enough to fill a gigabyte. */
export function normals(size: number, scale: number, seed: number): Float32Array {
  // A table of normals read in a scrambled order: the kernels only care about the distribution.
  const table = new Float32Array(1 << 16);
  let state = seed * 2654435761 + 12345;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  for (let i = 0; i < table.length; i++) {
    table[i] = scale * Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  const values = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    values[i] = table[(Math.imul(i, 40503) + (i >>> 16) * seed) & 0xffff] as number;
  }
  return values;
}

import { native } from '../../lib/native/load.ts';

/** The SIMD levels this machine has, weakest first. */
export function simdLevels(): readonly string[] {
  return native().info().simdLevels;
}

/**
 * Runs `fn` at every SIMD level of this machine, then goes back to the level there was. `fn` must be
 * synchronous: the level belongs to the process.
 */
export function forEachSimdLevel(fn: (level: string) => void): void {
  const before = native().info().simd;
  try {
    for (const level of simdLevels()) {
      native().setSimdLevel(level);
      try {
        const result: unknown = fn(level);
        if (result instanceof Promise) throw new Error('Expected a synchronous function');
      } catch (error) {
        if (error instanceof Error) error.message = `at SIMD level ${level}: ${error.message}`;
        throw error;
      }
    }
  } finally {
    native().setSimdLevel(before);
  }
}

/** The results of `fn` at each level, by name. */
export function atEachSimdLevel<T>(fn: (level: string) => T): Map<string, T> {
  const results = new Map<string, T>();
  forEachSimdLevel((level) => results.set(level, fn(level)));
  return results;
}

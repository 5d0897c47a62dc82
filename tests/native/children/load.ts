/** Loads the addon and prints the error it ends in, if any. */
import { native } from '../../../lib/native/load.ts';

try {
  console.log(native().info().simd);
} catch (error) {
  const { name, code, message } = error as Error & { code: string };
  console.log(JSON.stringify({ name, code, message }));
}

// Run by load.test.ts: prints what the addon says of itself.
import { native } from '../../../lib/native/load.ts';

console.log(JSON.stringify(native().info()));

// Starts a TypeScript worker: node's --import does not reach worker threads on every supported Node.
// Its name is the first element of argv.
import { register } from 'tsx/esm/api';

register();
await import(`./${process.argv[2]}.ts`);

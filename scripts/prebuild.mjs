// Puts this machine's addon where the package ships it: prebuilds/<platform>/vlm_grpo.node.
import { copyFileSync, mkdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const { platformName } = await import(join(root, 'dist/native/load.js'));
const folder = join(root, 'prebuilds', platformName());
mkdirSync(folder, { recursive: true });
copyFileSync(join(root, 'build/Release/vlm_grpo.node'), join(folder, 'vlm_grpo.node'));
console.log(`prebuilds/${platformName()}/vlm_grpo.node`);

#!/usr/bin/env node
import { Command } from 'commander';
import { version } from '../version.ts';
import { doctor } from './doctor.ts';

const program = new Command('vlm-grpo')
  .description('GRPO-family reinforcement learning of vision-language models')
  .version(version());

program
  .command('doctor')
  .description('print versions, the addons found, the SIMD level in use, CUDA and libtorch state')
  .option('--json', 'machine-readable output')
  .action((options: { json?: boolean }) => {
    const { report, healthy } = doctor();
    if (options.json) {
      console.log(JSON.stringify(report, null, 2));
    } else {
      for (const [section, lines] of Object.entries(report)) {
        console.log(section);
        for (const [name, value] of Object.entries(lines)) console.log(`  ${name}: ${value}`);
      }
    }
    process.exitCode = healthy ? 0 : 1;
  });

await program.parseAsync();

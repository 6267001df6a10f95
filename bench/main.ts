/** `npm run -s bench -- SCENARIO [--quick] [--json]`: progress on stderr, one table or one JSON document on stdout. */

import { benchContained, printContained } from './contained.js';
import { benchFanout } from './fanout.js';
import { printFanout } from './lib/fanout-rows.js';
import { printVfork } from './lib/fork-rows.js';
import { printScale } from './lib/scale/rows.js';
import { benchMigrate, printMigrate } from './migrate.js';
import { benchPush, printPush } from './push.js';
import { benchRdma, printRdma } from './rdma.js';
import { benchScale } from './scale.js';
import { benchVfork } from './vfork.js';

const SCENARIOS: Record<string, (isQuick: boolean, isJson: boolean) => Promise<string>> = {
  migrate: async (isQuick, isJson) => {
    const result = await benchMigrate({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printMigrate(result);
  },
  push: async (isQuick, isJson) => {
    const result = await benchPush({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printPush(result);
  },
  vfork: async (isQuick, isJson) => {
    const result = await benchVfork({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printVfork(result);
  },
  contained: async (isQuick, isJson) => {
    const result = await benchContained({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printContained(result);
  },
  fanout: async (isQuick, isJson) => {
    const result = await benchFanout({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printFanout(result);
  },
  rdma: async (isQuick, isJson) => {
    const result = await benchRdma({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printRdma(result);
  },
  scale: async (isQuick, isJson) => {
    const result = await benchScale({ isQuick, log: (line) => process.stderr.write(`${line}\n`) });
    return isJson ? JSON.stringify(result) : printScale(result);
  },
};

const [name = '', ...flags] = process.argv.slice(2);
const unknown = flags.filter((flag) => flag !== '--quick' && flag !== '--json');
const scenario = Object.hasOwn(SCENARIOS, name) ? SCENARIOS[name] : undefined;
if (!scenario || unknown.length > 0) {
  process.stderr.write(`usage: npm run -s bench -- ${Object.keys(SCENARIOS).join('|')} [--quick] [--json]\n`);
  process.exitCode = 2;
} else {
  process.stdout.write(`${await scenario(flags.includes('--quick'), flags.includes('--json'))}\n`);
}

import { type Result, type Scenario, simulate } from './simulate.js';

/** Describes how to reproduce a failure: the scenario, and the last events of the run. */
export async function expectSound(scenario: Scenario): Promise<Result> {
  const result = await simulate(scenario);
  const { violation, state, trace } = result;
  if (violation === null) return result;
  const again = `VMIGRATE_SIM_SEED=${scenario.seed} replays it if it came from a seed`;
  throw new Error([`${violation} (job ${state})`, JSON.stringify(scenario), again, ...trace.slice(-80)].join('\n'));
}

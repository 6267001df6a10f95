/**
 * The step of a pre-copy in which the VM stands still and the last of its memory is fetched. If that takes longer than
 * the request allows, the step fails, and its undo lets the VM run on at the source.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { describeBytes } from '../../planner/bytes.js';
import { switchMs } from '../../planner/migration/downtime.js';
import { withDeadline } from '../deadline.js';
import type { StepContext, StepExecutor } from './context.js';

/** No call between hosts is long. */
const LOOK_MS = 1_000;

export const pushLast: StepExecutor = {
  async forward(context) {
    const { ports, record, findings } = context;
    // After the last round no page is written any more, so what is fetched from here on is final.
    await inTime(context, ports.target.takeBack(record.session, findings.rounds));
    for (;;) {
      const { isDone } = await inTime(context, ports.target.fetchAhead(record.session, LOOK_MS, false));
      if (isDone) return undefined;
    }
  },
  async undo() {
    // The undo of stopSource lets the VM run on, and that of prepareTarget discards the pages.
  },
};

async function inTime<T>(context: StepContext, work: Promise<T>): Promise<T> {
  const { ports, marks, cancel, record } = context;
  const { request, memoryBytes } = record.plan;
  const forBytesMs = request.downtimeMsMax - switchMs(memoryBytes);
  const leftMs = forBytesMs - (ports.clock.nowMs() - (marks.stoppedAtMs ?? ports.clock.nowMs()));
  // 0 would be no deadline.
  const deadlineMs = Math.max(1, leftMs);
  try {
    return await withDeadline(ports.clock, work, deadlineMs, 'fetching what was written last', cancel);
  } catch (thrown) {
    const error = toMigrationError(thrown);
    throw error.code === 'TIMEOUT' ? tooLong(context, error) : error;
  }
}

function tooLong({ record, left }: StepContext, cause: MigrationError): MigrationError {
  const { vm, downtimeMsMax } = record.plan.request;
  const neededMs =
    left === null ? null : Math.ceil(switchMs(record.plan.memoryBytes) + (left.bytes * 1000) / left.fetchedBytesPerS);
  const had = left === null ? '' : `: ${describeBytes(left.bytes)} were left, which take about ${neededMs} ms`;
  return new MigrationError(
    'DOWNTIME_TOO_LONG',
    `${vm} would have stood still for more than ${downtimeMsMax} ms${had}`,
    {
      remedy: 'try again when it writes less, allow more (--max-downtime), or use --hybrid',
      details: { downtimeMsMax, neededMs },
      cause,
    },
  );
}

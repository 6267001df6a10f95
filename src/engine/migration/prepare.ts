/** The steps during which the VM runs undisturbed on the source. Their undo does not affect the guest. */
import { raised } from '../../domain/data-security.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { tracksWrites } from '../../domain/migration.js';
import type { StepExecutor } from './context.js';

export const reserve: StepExecutor = {
  async forward({ record, ports }) {
    const { vm } = record.plan.request;
    await ports.source.reserve(vm, record.job);
    await ports.registry.announceMove(vm, record.epoch, record.session);
    return undefined;
  },
  async undo({ record, ports }) {
    await ports.source.unreserve(record.plan.request.vm, record.job);
  },
};

export const prepareTarget: StepExecutor = {
  async forward({ record, ports }) {
    const { request, source } = record.plan;
    const known = {
      session: record.session,
      job: record.job,
      spec: record.spec,
      source,
      epoch: record.epoch,
      mode: request.mode,
      accel: record.accel,
      token: record.token,
      bandwidthBytesPerS: request.bandwidthBytesPerS,
      ...(record.memoryKey === undefined ? {} : { memoryKey: record.memoryKey }),
    };
    const { incarnation } = record;
    const reply = await ports.target.prepare(incarnation === undefined ? known : { ...known, incarnation }).catch(
      // Build 0.1.0 refuses a key that it does not know.
      async (thrown: unknown) => {
        if (incarnation === undefined || toMigrationError(thrown).code !== 'USAGE') throw thrown;
        return ports.target.prepare(known);
      },
    );
    if (reply.nativeUri !== null)
      throw new MigrationError('PEER_PROTOCOL', `${request.target} would take QEMU's own stream from anybody`);
    return undefined;
  },
  /** `discard` removes the whole session, so connectTarget and transferState have nothing to undo on the target. */
  async undo({ record, ports }) {
    await ports.target.discard(record.session);
  },
};

export const exposeSource: StepExecutor = {
  async forward(context) {
    const { record, ports } = context;
    const { mode } = record.plan.request;
    context.endpoint = await ports.source.expose({
      session: record.session,
      vm: record.plan.request.vm,
      token: record.token,
      transport: record.plan.request.transport,
      target: record.plan.request.target,
      ...(tracksWrites(mode) ? { isTracked: true } : {}),
    });
    return undefined;
  },
  async undo({ record, ports }) {
    await ports.source.unexpose(record.session);
  },
};

export const connectTarget: StepExecutor = {
  async forward({ record, ports, endpoint }) {
    if (endpoint === null) throw new MigrationError('INTERNAL', 'the plan connects before the source is exposed');
    await ports.target.connect(record.session, raised(endpoint, record.plan.request.dataSecurity));
    return undefined;
  },
  async undo() {
    // The undo of prepareTarget discards the session, and the connection with it.
  },
};

import { expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import { request } from '../planner/planner-facts.js';
import { gate, rest, Scripted } from './scripted.js';

test('the reason of the target’s QEMU becomes the cause, also if the source notices first', async () => {
  const world = new Scripted();
  const noticed = gate();
  world.on['A.transferState'] = () => {
    noticed.open();
    throw new MigrationError('QEMU_FAILED', "QEMU's migration has failed");
  };
  world.on['B.awaitLoaded'] = async () => {
    await noticed.passed;
    await new Promise((resolve) => setTimeout(resolve, 5));
    throw new MigrationError('QEMU_FAILED', "QEMU ended: Unknown section 'virtserialport'");
  };
  const { jobs } = await world.daemon();
  expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({
    state: 'failed',
    error: {
      cause: {
        message: expect.stringContaining('migration has failed'),
        cause: { message: expect.stringContaining('virtserialport') },
      },
    },
  });
});

test('the source’s own error stays as it is if the target has nothing to say', async () => {
  const world = new Scripted();
  world.on['A.transferState'] = () => {
    throw new MigrationError('QEMU_FAILED', 'no luck', { remedy: 'look at it' });
  };
  const { jobs } = await world.daemon();
  const { error } = await rest(jobs, (await jobs.submit(request)).id);
  expect(error).toMatchObject({ remedy: 'look at it', cause: { message: 'no luck', remedy: 'look at it' } });
  expect(error).not.toHaveProperty('cause.cause');
});

import { expect, test } from 'vitest';
import { withMountHint } from '../../../../src/agent/migration/page-link.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const refused = new MigrationError('UNAUTHENTICATED', 'connect: peer refused the session or its token');

test('a session that is refused over shared memory says that another daemon has answered', () => {
  expect(withMountHint(refused, '/var/lib/vmigrate/data.sock')).toMatchObject({
    code: 'UNAUTHENTICATED',
    message: expect.stringMatching(/refused.*the daemon that answers at \/var\/lib\/vmigrate\/data\.sock is not the/),
    remedy: expect.stringMatching(/--tcp.*mount namespace/),
  });
});

test('any other failure stays as it is', () => {
  expect(withMountHint(refused, '10.0.0.1')).toBe(refused);
  const lost = new MigrationError('DISCONNECTED', 'gone');
  expect(withMountHint(lost, '/var/lib/vmigrate/data.sock')).toBe(lost);
});

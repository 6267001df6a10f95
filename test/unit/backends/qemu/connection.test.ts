import { expect, test } from 'vitest';
import { QemuConnection } from '../../../../src/backends/qemu/connection.js';
import type { QmpClient } from '../../../../src/backends/qemu/qmp/client.js';

const GONE = expect.objectContaining({ code: 'QEMU_GONE' });
const PLACE = {
  ...{ name: 'web', directory: '/s/web', socketDirectory: '/s/web', serialPath: '', serialLogPath: '' },
  ...{ exitPath: '', agentPath: '', outputPath: '' },
};

class Line {
  isClosed = false;
  close(): void {
    this.isClosed = true;
  }
}

/** Each call gets the next of these answers. */
function connectionTo(lines: readonly Line[], dialled: string[] = []): QemuConnection {
  const rest = [...lines];
  return new QemuConnection(PLACE, async (path) => {
    dialled.push(path);
    return rest.shift() as unknown as QmpClient;
  });
}

test('whoever holds it speaks over the present connection, and over none while there is none', async () => {
  const [first, second] = [new Line(), new Line()];
  const dialled: string[] = [];
  const connection = connectionTo([first, second], dialled);
  expect(() => connection.qmp).toThrow(GONE);
  await connection.open({ timeoutMs: 1000 });
  expect(connection.qmp).toBe(first);
  first.close();
  expect(() => connection.qmp).toThrow(GONE);
  await connection.open({ timeoutMs: 1000 });
  expect(connection.qmp).toBe(second);
  expect(dialled).toEqual(['/s/web/qmp.sock', '/s/web/qmp.sock']);
  connection.close();
  expect(second.isClosed).toBe(true);
  expect(() => connection.qmp).toThrow(GONE);
});

test('a QEMU that has been started is waited for, one that is not there or has ended is not', async () => {
  const line = new Line();
  const connection = connectionTo([line]);
  await expect(connection.connected()).rejects.toEqual(GONE);
  connection.started();
  const waiting = connection.connected();
  await connection.open({ timeoutMs: 1000 });
  expect(await waiting).toBe(line);
  line.close();
  const lost = connection.connected();
  connection.close();
  await expect(lost).rejects.toEqual(GONE);
});

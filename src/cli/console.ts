/**
 * Connects the user's terminal to a VM's serial line. On a terminal, every key goes to the guest except Ctrl-], which
 * leaves the console. Without a terminal, stdin and stdout are piped through.
 */
import type { Duplex } from 'node:stream';
import type { ApiClient } from '../api/client.js';

const ESCAPE = 0x1d; // Ctrl-]
const BACKLOG_BYTES = 4096;

export async function attachConsole(client: ApiClient, vm: string): Promise<void> {
  const { stdin, stdout, stderr } = process;
  const isTerminal = stdin.isTTY && stdout.isTTY;
  const line: Duplex = await client.console(vm, isTerminal ? BACKLOG_BYTES : 0);
  if (isTerminal) {
    stderr.write(`console of ${vm}; leave it with Ctrl-]\n`);
    stdin.setRawMode(true);
  }
  try {
    await new Promise<void>((resolve, reject) => {
      line.once('error', reject);
      line.once('close', resolve);
      stdin.on('data', (data: Buffer) => {
        const escape = isTerminal ? data.indexOf(ESCAPE) : -1;
        if (escape < 0) {
          if (!line.write(data)) {
            stdin.pause();
            line.once('drain', () => stdin.resume());
          }
          return;
        }
        if (escape > 0) line.write(data.subarray(0, escape));
        line.end();
        resolve();
      });
      line.pipe(stdout, { end: false });
    });
  } finally {
    if (isTerminal) {
      stdin.setRawMode(false);
      stderr.write('\n');
    }
    stdin.pause();
    stdin.removeAllListeners('data');
    line.destroy();
  }
}

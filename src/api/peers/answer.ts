/** What another host has answered: the result of a call, or a body that is read as it arrives. */
import type { IncomingMessage } from 'node:http';
import { type Agent, request as httpsRequest } from 'node:https';
import { type Readable, Transform } from 'node:stream';
import { MigrationError } from '../../domain/errors.js';
import { connectionError } from './peer-errors.js';

const ANSWER_BYTES_MAX = 4 * 2 ** 20;
/** How long a stream may take to begin, and how long nothing of it may be taken by its reader. */
const STREAM_ANSWER_MS = 10_000;
const STREAM_SILENT_MS = 60_000;

/** Returns the `result` of the answer. Throws the error that it carries. */
export async function readAnswer(response: IncomingMessage, where: string): Promise<unknown> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  try {
    for await (const chunk of response as AsyncIterable<Buffer>) {
      bytes += chunk.length;
      if (bytes > ANSWER_BYTES_MAX)
        throw new MigrationError('PEER_PROTOCOL', `the response of ${where} exceeds ${ANSWER_BYTES_MAX / 2 ** 20} MiB`);
      chunks.push(chunk);
    }
  } catch (error) {
    if (error instanceof MigrationError) throw error;
    throw connectionError(error as NodeJS.ErrnoException, where, '');
  }
  let json: unknown;
  try {
    json = JSON.parse(Buffer.concat(chunks).toString('utf8'));
  } catch (cause) {
    throw new MigrationError('PEER_PROTOCOL', `the response of ${where} is not JSON`, { cause });
  }
  if (response.statusCode !== 200) throw MigrationError.fromJSON(json, where);
  if (typeof json !== 'object' || json === null || !('result' in json))
    throw new MigrationError('PEER_PROTOCOL', `the response of ${where} has no result`);
  return json.result;
}

export interface StreamSource {
  readonly agent: Agent;
  readonly where: string;
  readonly url: string;
  readonly path: string;
  readonly bytesMax: number;
}

/**
 * Opens the body of a GET. It fails if the other host cuts it off, and ends the request if the reader goes away. It
 * arrives as fast as it is read.
 */
export async function openStream({ agent, where, url, path, bytesMax }: StreamSource): Promise<Readable> {
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    const request = httpsRequest(new URL(path, url), { agent, method: 'GET' });
    const deadline = setTimeout(() => request.destroy(silent(where, STREAM_ANSWER_MS)), STREAM_ANSWER_MS);
    request.once('response', (answer) => {
      clearTimeout(deadline);
      resolve(answer);
    });
    request.on('error', (error) => {
      clearTimeout(deadline);
      reject(connectionError(error, where, url));
    });
    request.end();
  });
  if (response.statusCode !== 200) {
    await readAnswer(response, where);
    throw new MigrationError('PEER_PROTOCOL', `${where} answers with ${response.statusCode}`);
  }
  const body = limited(bytesMax, where);
  const cutOff = (cause?: Error): void => {
    const error = cause instanceof MigrationError ? cause : undefined;
    body.destroy(error ?? new MigrationError('DISCONNECTED', `the answer of ${where} was cut off`, { cause }));
  };
  response.setTimeout(STREAM_SILENT_MS, () => response.destroy(silent(where, STREAM_SILENT_MS)));
  response.once('error', cutOff);
  response.once('close', () => {
    if (!response.complete) cutOff();
  });
  body.once('close', () => response.destroy());
  return response.pipe(body);
}

function silent(where: string, ms: number): MigrationError {
  return new MigrationError('TIMEOUT', `${where} was silent for ${ms / 1000} s`, { isRetryable: true });
}

function limited(bytesMax: number, where: string): Transform {
  let seenBytes = 0;
  return new Transform({
    transform(chunk: Buffer, _, done) {
      seenBytes += chunk.length;
      if (seenBytes <= bytesMax) return done(null, chunk);
      return done(new MigrationError('PEER_PROTOCOL', `the answer of ${where} exceeds ${bytesMax / 2 ** 20} MiB`));
    },
  });
}

/** Who has written an image's file, and what a file may name of which nobody knows that. */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import {
  decodeHead,
  ENTRY,
  ENTRY_HEADER_BYTES,
  encodeEntry,
  HEAD_BYTES,
} from '../../../../src/agent/image/file-format.js';
import { SIGNATURE_BYTES } from '../../../../src/agent/image/file-signature.js';
import { EVERYTHING_ALLOWED, NOTHING_ALLOWED } from '../../../../src/domain/policy.js';
import { Authority } from '../../../../src/tls/authority.js';
import { TlsStore } from '../../../../src/tls/store.js';
import { ID, ImageScene } from '../../../support/image-scene.js';

let directory: string;
let authority: Authority;
let scene: ImageScene;
const stores: TlsStore[] = [];
const folder = (name: string): string => join(directory, name);

function signer(name: string): TlsStore {
  const store = new TlsStore(folder(name), () => undefined);
  stores.push(store);
  return store;
}

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-signed-'));
  authority = await Authority.create(folder('ca'), 'test');
  for (const name of ['A', 'B', 'revoked', 'old']) {
    const days = name === 'old' ? -1 : undefined;
    await authority.issue({ role: 'host', name }, ['127.0.0.1'], folder(name), days);
  }
  await authority.issue({ role: 'user', name: 'alice' }, [], folder('alice'));
  const stranger = await Authority.create(folder('ca2'), 'test');
  await stranger.issue({ role: 'host', name: 'A' }, ['127.0.0.1'], folder('stranger'));
});
afterAll(async () => {
  for (const store of stores) store.close();
  await rm(directory, { recursive: true, force: true });
});
beforeEach(() => {
  scene = new ImageScene();
});
afterEach(() => scene.end());

/** A host that allows strangers nothing. */
const strict = (name: string) => scene.contextOn(name, undefined, { policy: NOTHING_ALLOWED, signer: signer('B') });
const refused = { code: 'NOT_PERMITTED', message: expect.stringMatching(/not signed .* qemuArgs/) };

test('a file that a host of the cluster has written is loaded, whatever it names', async () => {
  const { file } = await scene.savedOn('A', {}, { signer: signer('A') });
  const { images } = await strict('B');
  expect((await images.load(file)).id).toBe(ID);
});

test('the certificate of the writer may have expired since', async () => {
  const { file } = await scene.savedOn('A', {}, { signer: signer('old') });
  expect((await (await strict('B')).images.load(file)).id).toBe(ID);
});

test.each([
  ['by nobody', null],
  ['by a user', 'alice'],
  ['by a host of another cluster', 'stranger'],
  ['by a host that is revoked', 'revoked'],
])('a file that is signed %s is loaded only by whoever trusts it', async (_how, name) => {
  const { file } = await scene.savedOn('A', {}, { signer: name === null ? null : signer(name) });
  if (name === 'revoked') {
    await authority.revoke(`host/${name}`);
    copyFileSync(join(folder('ca'), 'crl.pem'), join(folder('B'), 'crl.pem'));
  }
  const { images } = await strict('B');
  await expect(images.load(file)).rejects.toMatchObject({ ...refused, remedy: expect.stringMatching(/--trust/) });
  expect(images.list()).toEqual([]);
  expect((await images.load(file, { isTrusted: true })).id).toBe(ID);
});

test('a file that names only what the policy allows needs no signature', async () => {
  const { file } = await scene.savedOn('A');
  const { images } = await scene.contextOn('B', undefined, { policy: EVERYTHING_ALLOWED });
  expect((await images.load(file)).id).toBe(ID);
});

test('the signature of one file is none of another description', async () => {
  const { file } = await scene.savedOn('A', {}, { signer: signer('A') });
  const good = readFileSync(file);
  const { descriptionBytes } = decodeHead(good);
  const end = HEAD_BYTES + ENTRY_HEADER_BYTES + descriptionBytes;
  const text = good.subarray(HEAD_BYTES + ENTRY_HEADER_BYTES, end).toString('utf8');
  const other = Buffer.from(text.replace('-cdrom', '-fdrom'));
  const header = encodeEntry({ kind: ENTRY.DESCRIPTION, region: 0, offsetBytes: 0, lengthBytes: other.length }, other);
  writeFileSync(file, Buffer.concat([good.subarray(0, HEAD_BYTES), header, other, good.subarray(end)]));
  await expect((await strict('B')).images.load(file)).rejects.toMatchObject(refused);
});

test('the signature of one content is none of another', async () => {
  const { file } = await scene.savedOn('A', {}, { signer: signer('A') });
  const good = readFileSync(file);
  const { descriptionBytes } = decodeHead(good);
  const state = HEAD_BYTES + 2 * ENTRY_HEADER_BYTES + descriptionBytes + SIGNATURE_BYTES;
  const data = Buffer.from('STATE');
  const header = encodeEntry({ kind: ENTRY.DEVICE_STATE, region: 0, offsetBytes: 0, lengthBytes: data.length }, data);
  const rest = good.subarray(state + ENTRY_HEADER_BYTES + data.length);
  writeFileSync(file, Buffer.concat([good.subarray(0, state), header, data, rest]));
  const { images } = await strict('B');
  // Not even whoever trusts it gets another content than that which was signed.
  for (const isTrusted of [false, true])
    await expect(images.load(file, { isTrusted })).rejects.toMatchObject({
      code: 'CORRUPT',
      message: expect.stringMatching(/was signed/),
    });
  expect(images.list()).toEqual([]);
});

test('an image whose pages nobody has checked is not one of this host after it was saved and loaded', async () => {
  const host = await scene.contextOn('A', undefined, { signer: signer('A') });
  await scene.forked(host);
  await host.context.images.update(ID, { isChecked: false, from: 'root', sharedWith: ['root'] });
  const file = join(scene.directory, 'unchecked.img');
  await host.images.save(ID, file);
  const { images, context } = await scene.contextOn('B', undefined, { signer: signer('B') });
  await images.load(file);
  const loaded = context.images.get(ID);
  expect([loaded.isChecked, loaded.from, loaded.sharedWith]).toEqual([false, undefined, undefined]);
});

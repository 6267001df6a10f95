import { execFile } from 'node:child_process';
import { mkdir, mkdtemp, realpath, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { forbiddenOnHost, refuseForbiddenPath } from '../../../../src/agent/policy/policy.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import { NOTHING_ALLOWED } from '../../../../src/domain/policy.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const qemuImg = (...args: string[]) => promisify(execFile)('qemu-img', ['create', '-q', ...args]);
const { diskFiles } = new QemuBackend();
let directory: string;
const allowed = (name: string): string => join(directory, 'allowed', name);
const secret = (): string => join(directory, 'secret');
const policy = () => ({ ...NOTHING_ALLOWED, paths: [join(directory, 'allowed')] });

beforeAll(async () => {
  directory = await realpath(await mkdtemp(join(tmpdir(), 'vmg-policy-')));
  await mkdir(allowed(''), { recursive: true });
  await writeFile(secret(), 'x'.repeat(1 << 20));
  await qemuImg('-f', 'raw', allowed('base.raw'), '1M');
  await qemuImg('-f', 'qcow2', '-b', allowed('base.raw'), '-F', 'raw', allowed('good.qcow2'));
  await qemuImg('-f', 'qcow2', '-b', secret(), '-F', 'raw', allowed('behind.qcow2'));
  await qemuImg('-f', 'qcow2', '-b', allowed('behind.qcow2'), '-F', 'qcow2', allowed('far-behind.qcow2'));
  await qemuImg('-f', 'qcow2', '-u', '-b', 'nbd://192.0.2.1/x', '-F', 'raw', allowed('network.qcow2'), '1M');
  await qemuImg(
    '-f',
    'qcow2',
    '-u',
    '-b',
    `json:{"driver":"file","filename":"${secret()}"}`,
    '-F',
    'raw',
    allowed('json.qcow2'),
    '1M',
  );
  await qemuImg(
    '-f',
    'qcow2',
    '-o',
    `data_file=${join(directory, 'elsewhere')},data_file_raw=on`,
    allowed('content.qcow2'),
    '1M',
  );
  const content = { driver: 'file', filename: secret() };
  const options = { driver: 'qcow2', file: { driver: 'file', filename: allowed('own.qcow2') }, 'data-file': content };
  await qemuImg(
    ...['-f', 'qcow2', '-o', `data_file=${allowed('own.raw')},data_file_raw=on`, allowed('own.qcow2'), '1M'],
  );
  const named = `json:${JSON.stringify(options)}`;
  await qemuImg('-f', 'qcow2', '-u', '-b', named, '-F', 'qcow2', allowed('options.qcow2'), '1M');
  await symlink(allowed(''), join(directory, 'alias'));
  await symlink(secret(), allowed('link.raw'));
  await symlink(directory, allowed('up'));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

const disk = (path: string) => parseSpec({ name: 'web', memory: { size: '64M' }, disks: [{ path }] });

describe('a disk in an allowed directory', () => {
  test('is allowed with all of its layers', async () => {
    expect(await forbiddenOnHost(disk(allowed('good.qcow2')), policy(), diskFiles)).toEqual([]);
    expect(await forbiddenOnHost(disk(allowed('base.raw')), policy(), diskFiles)).toEqual([]);
    expect(await forbiddenOnHost(disk(allowed('missing.raw')), policy(), diskFiles)).toEqual([]);
  });

  test.each([
    ...['link.raw', 'up/secret', 'behind.qcow2', 'far-behind.qcow2', 'network.qcow2', 'json.qcow2', 'content.qcow2'],
    'options.qcow2',
  ])('that leads elsewhere is not: %s', async (name) => {
    expect(await forbiddenOnHost(disk(allowed(name)), policy(), diskFiles)).toMatchObject([{ key: 'paths' }]);
  });

  test('is not opened before the policy has seen it', async () => {
    const opened: string[] = [];
    const layer: typeof diskFiles.layer = (path, format) => {
      opened.push(path);
      return diskFiles.layer(path, format);
    };
    await forbiddenOnHost(disk(allowed('far-behind.qcow2')), policy(), { ...diskFiles, layer });
    expect(opened).toEqual([allowed('far-behind.qcow2'), allowed('behind.qcow2')]);
    await forbiddenOnHost(disk(allowed('link.raw')), policy(), { ...diskFiles, layer });
    expect(opened).toHaveLength(2);
  });

  test('may be named by a link, if that is what the policy says', async () => {
    const alias = { ...NOTHING_ALLOWED, paths: [join(directory, 'alias')] };
    expect(await forbiddenOnHost(disk(join(directory, 'alias/good.qcow2')), alias, diskFiles)).toEqual([]);
    expect(await forbiddenOnHost(disk(join(directory, 'alias/base.raw')), alias, diskFiles)).toEqual([]);
    expect(await forbiddenOnHost(disk(join(directory, 'alias/link.raw')), alias, diskFiles)).toHaveLength(1);
  });

  test('is not opened if its words are forbidden', async () => {
    const refusing = { chain: () => Promise.reject(new Error('opened')) } as unknown as typeof diskFiles;
    expect(await forbiddenOnHost(disk('/srv/x.qcow2'), policy(), refusing)).toHaveLength(1);
  });
});

describe('a file to read or to write', () => {
  const refuse = (path: string) => refuseForbiddenPath(path, { policy: policy(), who: 'user/alice', host: 'A' });

  test('may be missing', async () => {
    await refuse(allowed('base.raw'));
    await refuse(allowed('new.image'));
  });

  test.each(['link.raw', 'up/new.image', 'up/secret', '../secret'])('may not lead elsewhere: %s', async (name) => {
    await expect(refuse(`${join(directory, 'allowed')}/${name}`)).rejects.toMatchObject({ code: 'NOT_PERMITTED' });
  });
});

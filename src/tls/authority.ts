/**
 * The cluster's certificate authority: a folder with the CA's key, the list of issued certificates, and the revocation
 * list. Only `vmctl certs` uses it, and only this file loads the certificate library.
 *
 *   CA folder                                  a host's or user's folder
 *     ca.pem, ca-key.pem (0600)                  ca.pem, crl.pem
 *     crl.pem                                    cert.pem, key.pem (0600)
 *     issued.json
 */
import { webcrypto, X509Certificate } from 'node:crypto';
import { open, readFile, rename } from 'node:fs/promises';
import { isIP } from 'node:net';
import { join, resolve } from 'node:path';
import type * as x509Types from '@peculiar/x509';
import type { UserRole } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';
import { makeDirectories } from '../kit/directory.js';
import { commonName, type Identity, isName, parseCommonName } from './identity.js';

const DAY_MS = 86_400_000;
const CA_DAYS = 3652;
const LEAF_DAYS = 365;
/** A certificate is valid from an hour before its creation, so that a host whose clock is behind accepts it. */
const BACKDATE_MS = 3_600_000;
const KEY = { name: 'ECDSA', namedCurve: 'P-256' } as const;
const SIGNING = { name: 'ECDSA', hash: 'SHA-256' } as const;
const SERVER_AUTH = '1.3.6.1.5.5.7.3.1';
const CLIENT_AUTH = '1.3.6.1.5.5.7.3.2';

export interface Issued {
  readonly name: string;
  readonly role: Identity['role'];
  /** What a user may do. Absent for hosts, and for users of earlier builds, who may look. */
  readonly userRole?: UserRole;
  readonly serial: string;
  readonly addresses: readonly string[];
  readonly expiresAt: string;
  readonly revokedAt: string | null;
}

interface Book {
  readonly cluster: string;
  readonly issued: readonly Issued[];
}

type X509 = typeof x509Types;

async function loadX509(): Promise<X509> {
  // The library's dependency injection needs this polyfill of decorator metadata to be loaded first.
  await import('reflect-metadata');
  const x509 = await import('@peculiar/x509');
  x509.cryptoProvider.set(webcrypto);
  return x509;
}

/** Writes a file durably and as a whole: a partly written key or list would lock the cluster out. */
async function writeDurably(path: string, text: string, mode: number): Promise<void> {
  const temporary = `${path}.new`;
  const file = await open(temporary, 'w', mode);
  try {
    await file.chmod(mode);
    await file.writeFile(text);
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(temporary, path);
}

function newSerial(): string {
  const bytes = webcrypto.getRandomValues(new Uint8Array(16));
  // The first byte is 0x40..0x7f, so that the number is positive and has its full length.
  bytes[0] = ((bytes[0] ?? 0) & 0x3f) | 0x40;
  return Buffer.from(bytes).toString('hex').toUpperCase();
}

/** Encodes DER as PEM (RFC 7468). The library labels revocation lists in a way that OpenSSL does not read. */
function pem(label: string, der: ArrayBuffer): string {
  const lines =
    Buffer.from(der)
      .toString('base64')
      .match(/.{1,64}/g) ?? [];
  return `-----BEGIN ${label}-----\n${lines.join('\n')}\n-----END ${label}-----\n`;
}

async function pemOfKey(key: webcrypto.CryptoKey): Promise<string> {
  return pem('PRIVATE KEY', await webcrypto.subtle.exportKey('pkcs8', key));
}

export class Authority {
  private constructor(
    private readonly directory: string,
    private readonly x509: X509,
    private readonly caPem: string,
    private readonly caKey: webcrypto.CryptoKey,
    private book: Book,
  ) {}

  /**
   * Creates a CA in `directory`. Throws CONFLICT if it holds one, because all its certificates would become invalid.
   */
  static async create(directory: string, cluster: string): Promise<Authority> {
    if (!isName(cluster)) throw new MigrationError('USAGE', `"${cluster}" is not a valid cluster name`);
    await makeDirectories(resolve(directory), 0o700);
    const keyPath = join(directory, 'ca-key.pem');
    if (await exists(keyPath))
      throw new MigrationError('CONFLICT', `${directory} already holds a certificate authority`);
    const x509 = await loadX509();
    const keys = await webcrypto.subtle.generateKey(KEY, true, ['sign', 'verify']);
    const now = Date.now();
    const certificate = await x509.X509CertificateGenerator.createSelfSigned({
      serialNumber: newSerial(),
      name: `CN=vmigrate ${cluster}`,
      notBefore: new Date(now - BACKDATE_MS),
      notAfter: new Date(now + CA_DAYS * DAY_MS),
      signingAlgorithm: SIGNING,
      keys: keys,
      extensions: [
        new x509.BasicConstraintsExtension(true, 0, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
        await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
      ],
    });
    const caPem = pem('CERTIFICATE', certificate.rawData);
    await writeDurably(keyPath, await pemOfKey(keys.privateKey), 0o600);
    await writeDurably(join(directory, 'ca.pem'), caPem, 0o644);
    const authority = new Authority(directory, x509, caPem, keys.privateKey, { cluster, issued: [] });
    await authority.save();
    return authority;
  }

  static async open(directory: string): Promise<Authority> {
    const [caPem, keyPem, bookText] = await Promise.all(
      ['ca.pem', 'ca-key.pem', 'issued.json'].map((file) => readFile(join(directory, file), 'utf8')),
    ).catch((error: unknown) => {
      throw new MigrationError('NOT_FOUND', `${directory} holds no certificate authority`, {
        remedy: `create one: vmctl certs init ${directory}`,
        cause: error,
      });
    });
    const x509 = await loadX509();
    const bytes = Buffer.from((keyPem ?? '').replace(/-----[^-]+-----|\s/g, ''), 'base64');
    const key = await webcrypto.subtle.importKey('pkcs8', bytes, KEY, false, ['sign']).catch((error: unknown) => {
      throw new MigrationError('CORRUPT', `${join(directory, 'ca-key.pem')} does not hold a valid CA key`, {
        cause: error,
      });
    });
    return new Authority(directory, x509, caPem ?? '', key, parseBook(bookText ?? '', directory));
  }

  get cluster(): string {
    return this.book.cluster;
  }

  get issued(): readonly Issued[] {
    return this.book.issued;
  }

  /**
   * Issues a new key and certificate into `out`. Earlier certificates of the name stay valid until they are revoked.
   */
  async issue(
    { userRole, ...identity }: Identity & { readonly userRole?: UserRole | undefined },
    addresses: readonly string[],
    out: string,
    days = LEAF_DAYS,
  ): Promise<Issued> {
    if (!isName(identity.name))
      throw new MigrationError('USAGE', `"${identity.name}" is not a valid name for a ${identity.role}`);
    await refuseOthersFolder(resolve(out), identity);
    const { x509 } = this;
    const isHost = identity.role === 'host';
    const keys = await webcrypto.subtle.generateKey(KEY, true, ['sign', 'verify']);
    const ca = new x509.X509Certificate(this.caPem);
    const now = Date.now();
    const expiresAt = new Date(Math.min(now + days * DAY_MS, ca.notAfter.getTime()));
    const serial = newSerial();
    const certificate = await x509.X509CertificateGenerator.create({
      serialNumber: serial,
      subject: `CN=${commonName(identity)}${isHost || userRole === undefined ? '' : `,OU=${userRole}`}`,
      issuer: ca.subjectName,
      notBefore: new Date(Math.min(now, expiresAt.getTime()) - BACKDATE_MS),
      notAfter: expiresAt,
      signingAlgorithm: SIGNING,
      publicKey: keys.publicKey,
      signingKey: this.caKey,
      extensions: [
        new x509.BasicConstraintsExtension(false, undefined, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
        // Clients demand serverAuth, so nobody can pose as a server with a user's certificate.
        new x509.ExtendedKeyUsageExtension(isHost ? [SERVER_AUTH, CLIENT_AUTH] : [CLIENT_AUTH]),
        await x509.AuthorityKeyIdentifierExtension.create(ca, false),
        ...(isHost
          ? [
              new x509.SubjectAlternativeNameExtension([
                { type: 'dns', value: identity.name },
                ...addresses.map((value) => ({ type: isIP(value) === 0 ? ('dns' as const) : ('ip' as const), value })),
              ]),
            ]
          : []),
      ],
    });
    const issued: Issued = {
      ...identity,
      ...(isHost || userRole === undefined ? {} : { userRole }),
      serial,
      addresses: [...addresses],
      expiresAt: expiresAt.toISOString(),
      revokedAt: null,
    };
    // The certificate is recorded before it is written: one that is not recorded could not be revoked.
    this.book = { ...this.book, issued: [...this.book.issued, issued] };
    await this.save();
    await makeDirectories(resolve(out), 0o700);
    await writeDurably(join(out, 'key.pem'), await pemOfKey(keys.privateKey), 0o600);
    await writeDurably(join(out, 'cert.pem'), pem('CERTIFICATE', certificate.rawData), 0o644);
    await writeDurably(join(out, 'ca.pem'), this.caPem, 0o644);
    await this.copyRevocations(out);
    return issued;
  }

  /** Revokes all certificates of the name. Throws NOT_FOUND if there is none left to revoke. */
  async revoke(name: string): Promise<readonly Issued[]> {
    const isHit = (entry: Issued) => entry.revokedAt === null && (entry.name === name || commonName(entry) === name);
    const hit = this.book.issued.filter(isHit);
    if (hit.length === 0) throw new MigrationError('NOT_FOUND', `no valid certificate has been issued to ${name}`);
    const revokedAt = new Date().toISOString();
    this.book = {
      ...this.book,
      issued: this.book.issued.map((entry) => (isHit(entry) ? { ...entry, revokedAt } : entry)),
    };
    await this.save();
    return hit.map((entry) => ({ ...entry, revokedAt }));
  }

  /** Copies the current revocation list into a host's folder; the host's daemon notices it by itself. */
  async copyRevocations(out: string): Promise<void> {
    await writeDurably(join(out, 'crl.pem'), await readFile(join(this.directory, 'crl.pem'), 'utf8'), 0o644);
  }

  private async save(): Promise<void> {
    const { x509 } = this;
    const ca = new x509.X509Certificate(this.caPem);
    const now = Date.now();
    const list = await x509.X509CrlGenerator.create({
      issuer: ca.subjectName,
      thisUpdate: new Date(now - BACKDATE_MS),
      // The list is valid as long as the CA, so that a cluster does not lock itself out for want of a new list.
      nextUpdate: ca.notAfter,
      signingAlgorithm: SIGNING,
      signingKey: this.caKey,
      entries: this.book.issued
        .filter(({ revokedAt }) => revokedAt !== null)
        .map(({ serial, revokedAt }) => ({ serialNumber: serial, revocationDate: new Date(revokedAt ?? now) })),
    });
    await writeDurably(join(this.directory, 'issued.json'), `${JSON.stringify(this.book, null, 2)}\n`, 0o600);
    await writeDurably(join(this.directory, 'crl.pem'), pem('X509 CRL', list.rawData), 0o644);
  }
}

async function exists(path: string): Promise<boolean> {
  return readFile(path).then(
    () => true,
    () => false,
  );
}

function parseBook(text: string, directory: string): Book {
  try {
    const book = JSON.parse(text) as Book;
    if (typeof book.cluster === 'string' && Array.isArray(book.issued)) return book;
  } catch (error) {
    throw new MigrationError('CORRUPT', `${directory}/issued.json is not JSON`, { cause: error });
  }
  throw new MigrationError('CORRUPT', `${directory}/issued.json is not a valid list of issued certificates`);
}

/** A lost key could not be had back, and its certificate would stay valid. The same name may get a new certificate. */
async function refuseOthersFolder(directory: string, identity: Identity): Promise<void> {
  const text = await readFile(join(directory, 'cert.pem'), 'utf8').catch(() => null);
  if (text === null) return;
  let owner: Identity | null = null;
  try {
    owner = parseCommonName(/^CN=(.*)$/m.exec(new X509Certificate(text).subject)?.[1]);
  } catch {
    // It is no certificate, so it is nobody's that this authority knows.
  }
  if (owner !== null && commonName(owner) === commonName(identity)) return;
  const whose =
    owner === null ? 'a file that is no certificate of this kind' : `the certificate of ${commonName(owner)}`;
  throw new MigrationError('CONFLICT', `${join(directory, 'cert.pem')} is ${whose}`, {
    remedy: `name another folder with --out: each host and user needs one of its own`,
  });
}

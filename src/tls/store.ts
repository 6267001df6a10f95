/**
 * The host's certificate folder for the daemon: key, certificate, CA and revocation list. The folder is watched with
 * inotify, without a timer. A new revocation list takes effect for new handshakes and for open connections.
 */
import { createHash, X509Certificate } from 'node:crypto';
import { type FSWatcher, readFileSync, watch } from 'node:fs';
import { join } from 'node:path';
import { createSecureContext, type SecureContextOptions, type TLSSocket } from 'node:tls';
import { MigrationError } from '../domain/errors.js';
import type { HostSignature } from '../domain/signature.js';
import { normalizeSerial, revokedSerials } from './crl.js';
import { type Identity, identityOf, type ProvenIdentity, parseCommonName } from './identity.js';
import { type SigningMaterial, signBytes, signerOf } from './signature.js';

interface Material {
  readonly files: SigningMaterial;
  readonly context: SecureContextOptions;
  readonly revoked: ReadonlySet<string>;
  readonly digest: string;
  readonly identity: Identity;
  readonly validFrom: string;
  readonly expiresAt: string;
}

export class TlsStore {
  private readonly listeners = new Set<() => void>();
  private readonly watcher: FSWatcher;
  private material: Material;

  /** Throws if the folder cannot be used: a daemon does not start without the TLS that is configured. */
  constructor(
    readonly directory: string,
    private readonly onError: (error: MigrationError) => void,
  ) {
    this.material = read(directory);
    // Editors and renames cause several events. Reading again then finds the same digest.
    this.watcher = watch(directory, { persistent: false }, () => this.reload());
    this.watcher.on('error', (error) =>
      onError(new MigrationError('INTERNAL', `cannot watch ${directory}`, { cause: error })),
    );
  }

  /** Returns the options for node:tls on both sides: TLS 1.3 only, and every peer must present a certificate. */
  options(): SecureContextOptions & { requestCert: true; rejectUnauthorized: true } {
    return { ...this.material.context, requestCert: true, rejectUnauthorized: true };
  }

  /** Signs with the key of this host. */
  sign(bytes: Buffer): HostSignature {
    return signBytes(this.material.files, bytes);
  }

  /** Returns the host that has signed the bytes, or null. */
  signerOf(signature: HostSignature, bytes: Buffer): string | null {
    return signerOf(this.material.files, signature, bytes);
  }

  get identity(): Identity {
    return this.material.identity;
  }

  get validFrom(): string {
    return this.material.validFrom;
  }

  get expiresAt(): string {
    return this.material.expiresAt;
  }

  isRevoked(serial: string): boolean {
    return this.material.revoked.has(normalizeSerial(serial));
  }

  /** Returns the peer's identity now: null if the certificate was revoked, or has expired since the handshake. */
  peerOf(socket: TLSSocket): ProvenIdentity | null {
    const certificate = socket.getPeerCertificate();
    if (!socket.authorized || certificate?.serialNumber === undefined || this.isRevoked(certificate.serialNumber))
      return null;
    const isExpired = !(Date.parse(certificate.valid_to) > Date.now());
    return isExpired ? null : identityOf(certificate);
  }

  /** Registers a listener that is called after each accepted change. Returns the function that unregisters it. */
  onChange(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** Reads the folder again. If it cannot be used, the error is reported and the old material stays in force. */
  reload(): void {
    try {
      const next = read(this.directory);
      if (next.digest === this.material.digest) return;
      this.material = next;
    } catch (error) {
      const code = (error as { cause?: NodeJS.ErrnoException }).cause?.code;
      // Between two renames a file may be missing for a moment. Its arrival causes another event.
      if (code !== 'ENOENT') this.onError(error as MigrationError);
      return;
    }
    for (const listener of this.listeners) listener();
  }

  close(): void {
    this.watcher.close();
    this.listeners.clear();
  }
}

function read(directory: string): Material {
  const file = (name: string): Buffer => {
    try {
      return readFileSync(join(directory, name));
    } catch (error) {
      throw new MigrationError('SPEC_INVALID', `cannot read ${join(directory, name)}`, {
        remedy: 'create it: vmctl certs host NAME --dir CA_DIR --out DIR',
        cause: error,
      });
    }
  };
  const [ca, crl, cert, key] = [file('ca.pem'), file('crl.pem'), file('cert.pem'), file('key.pem')];
  try {
    const certificate = new X509Certificate(cert);
    const identity = parseCommonName(/^CN=(.*)$/m.exec(certificate.subject)?.[1]);
    if (identity === null)
      throw new MigrationError('SPEC_INVALID', `the name in ${directory}/cert.pem is not host/NAME or user/NAME`);
    const context: SecureContextOptions = { ca, crl, cert, key, minVersion: 'TLSv1.3', maxVersion: 'TLSv1.3' };
    createSecureContext(context); // throws when key, certificate and list do not fit together
    const digest = createHash('sha256').update(ca).update(crl).update(cert).update(key).digest('hex');
    const expiresAt = new Date(certificate.validTo).toISOString();
    const validFrom = new Date(certificate.validFrom).toISOString();
    const files = { ca, crl, cert, key };
    return { files, context, revoked: revokedSerials(crl.toString('latin1')), digest, identity, validFrom, expiresAt };
  } catch (error) {
    if (error instanceof MigrationError) throw error;
    throw new MigrationError('SPEC_INVALID', `the certificate folder ${directory} cannot be used`, { cause: error });
  }
}

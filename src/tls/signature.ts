/**
 * What a host signs with the key of its certificate, and who has signed what. A signature outlives the certificate: a
 * file is read years later, and a stolen key is revoked.
 */
import { createPrivateKey, sign, verify, X509Certificate } from 'node:crypto';
import type { HostSignature } from '../domain/signature.js';
import { normalizeSerial, revokedSerials } from './crl.js';
import { type Identity, parseCommonName } from './identity.js';

/** The certificate folder's content, as PEM. */
export interface SigningMaterial {
  readonly ca: Buffer;
  readonly crl: Buffer;
  readonly cert: Buffer;
  readonly key: Buffer;
}

export function signBytes({ cert, key }: SigningMaterial, bytes: Buffer): HostSignature {
  const signature = sign(null, bytes, createPrivateKey(key)).toString('base64');
  return { certificate: cert.toString('latin1'), signature };
}

/**
 * Returns the host of this cluster that has signed these bytes, or null: it is another cluster's, a user's or a revoked
 * one, or the bytes are others.
 */
export function signerOf(
  { ca, crl }: SigningMaterial,
  { certificate, signature }: HostSignature,
  bytes: Buffer,
): string | null {
  try {
    const signer = new X509Certificate(certificate);
    const identity = identityIn(signer);
    const isOurs = certificatesIn(ca).some((one) => signer.checkIssued(one) && signer.verify(one.publicKey));
    const isRevoked = revokedSerials(crl.toString('latin1')).has(normalizeSerial(signer.serialNumber));
    if (!isOurs || isRevoked || identity?.role !== 'host') return null;
    return verify(null, bytes, signer.publicKey, Buffer.from(signature, 'base64')) ? identity.name : null;
  } catch {
    // What is no certificate, or has a key of another kind, proves nothing.
    return null;
  }
}

/** While a cluster changes its authority the file has two. */
function certificatesIn(pem: Buffer): X509Certificate[] {
  const blocks = pem.toString('latin1').match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  return blocks.map((block) => new X509Certificate(block));
}

function identityIn({ subject }: X509Certificate): Identity | null {
  return parseCommonName(/^CN=(.*)$/m.exec(subject)?.[1]);
}

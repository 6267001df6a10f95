/** What a host has signed with the key of its certificate. */
export interface HostSignature {
  /** The signer's certificate, as PEM. */
  readonly certificate: string;
  /** Base64. */
  readonly signature: string;
}

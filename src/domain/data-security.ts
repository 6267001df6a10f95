/** How the bytes of a session are protected between two hosts over a transport whose frames this project sends. */

/** From the weakest on. `integrity`: whatever was changed on the way ends the connection. `encrypt`: TLS 1.3. */
export const DATA_SECURITIES = ['none', 'integrity', 'encrypt'] as const;
export type DataSecurity = (typeof DATA_SECURITIES)[number];

export const DATA_SECURITY_DEFAULT: DataSecurity = 'integrity';

/** What a host demands of its data connections. */
export interface DataPolicy {
  /** The least that it accepts. */
  readonly dataSecurity: DataSecurity;
  /** It also takes connections of a peer of the older protocol: the token in clear, and no protection. */
  readonly acceptOldHello: boolean;
  /** `trusted`: something below RDMA encrypts (IPsec, MACsec), so that it does where encryption is demanded. */
  readonly rdma?: RdmaTrust;
}

export const RDMA_TRUSTS = ['untrusted', 'trusted'] as const;
export type RdmaTrust = (typeof RDMA_TRUSTS)[number];

export const DATA_POLICY_DEFAULT: DataPolicy = { dataSecurity: DATA_SECURITY_DEFAULT, acceptOldHello: false };

export function strongest(...all: readonly DataSecurity[]): DataSecurity {
  return DATA_SECURITIES[Math.max(0, ...all.map((one) => DATA_SECURITIES.indexOf(one)))] ?? DATA_SECURITY_DEFAULT;
}

/** As `one`, which must not be weaker than `least`. */
export function raised<T extends { readonly dataSecurity?: DataSecurity }>(one: T, least: DataSecurity | undefined): T {
  if (least === undefined) return one;
  return { ...one, dataSecurity: strongest(one.dataSecurity ?? DATA_SECURITY_DEFAULT, least) };
}

/** How the bytes of a session are protected between two hosts over a transport whose frames this project sends. */

/** From the weakest on. `integrity`: whatever was changed on the way ends the connection. */
export const DATA_SECURITIES = ['none', 'integrity'] as const;
export type DataSecurity = (typeof DATA_SECURITIES)[number];

export const DATA_SECURITY_DEFAULT: DataSecurity = 'integrity';

/** What a host demands of its data connections. */
export interface DataPolicy {
  /** The least that it accepts. */
  readonly dataSecurity: DataSecurity;
  /** It also takes connections of a peer of the older protocol: the token in clear, and no protection. */
  readonly acceptOldHello: boolean;
}

export const DATA_POLICY_DEFAULT: DataPolicy = { dataSecurity: DATA_SECURITY_DEFAULT, acceptOldHello: false };

export function strongest(...all: readonly DataSecurity[]): DataSecurity {
  return DATA_SECURITIES[Math.max(0, ...all.map((one) => DATA_SECURITIES.indexOf(one)))] ?? DATA_SECURITY_DEFAULT;
}

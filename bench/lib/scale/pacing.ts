/** Who decides how fast the model's root sends to the group: the native pacing, or a stand-in where there is none. */

export interface ReceiverReport {
  readonly clockNs: number;
  readonly highestSequence: number;
  readonly receivedDatagrams: number;
  readonly receivedBytes: number;
}

export interface Pacer {
  report(member: number, report: ReceiverReport, atNs: number): void;
  rateBytesPerS(atNs: number): number;
}

export interface Pacing {
  /** For the report of the bench. */
  readonly name: string;
  readonly open: (options: { readonly linkBytesPerS: number }) => Pacer;
}

const SHARE = 0.9;

/** Not the real pacing: a constant share of a link. It lets the rest of the model run without the addon. */
export const standInPacing: Pacing = {
  name: `a constant ${100 * SHARE} % of a link, because this addon has no openPacer`,
  open: ({ linkBytesPerS }) => ({ report: () => undefined, rateBytesPerS: () => SHARE * linkBytesPerS }),
};

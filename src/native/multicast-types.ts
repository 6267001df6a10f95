import type { NativeFailure, RegionFile, TouchOrder } from './basic-types.js';

/** Where an image is sent by multicast, and the secrets that only its members know. */
export interface MulticastGroup {
  /** `udp` or `verbs`. UNSUPPORTED if this host cannot do it. */
  readonly provider: string;
  /** IP address of the group. */
  readonly group: string;
  readonly port: number;
  /** Address of the interface on this host. Null: the interface that the route to the group names. */
  readonly interfaceAddress: string | null;
  /** How many routers a packet may pass, and one more. */
  readonly ttl: number;
  /** 64 hex digits, random, for this multicast only: a key that is used again can be forged. */
  readonly key: string;
  /** 16 hex digits, random. */
  readonly session: string;
  /** The largest IP packet; 0: that of the interface. */
  readonly mtuBytes: number;
}

export interface MulticastJoin extends MulticastGroup {
  /** From 1 on, different for each receiver. */
  readonly member: number;
}

export interface MulticastSenderOptions {
  /** The files of a complete image, with pages of 4 KiB. */
  readonly image: readonly RegionFile[];
  readonly group: MulticastGroup;
  /** 0 for no limit. */
  readonly bandwidthBytesPerS: number;
  /** What is sent first, after the pages that receivers want. Absent: the first page. */
  readonly order?: TouchOrder;
  readonly onEdge: () => void;
}

export interface MulticastSenderSnapshot {
  /** `ended`: all pages have been sent, or nobody listens. `failed`: the receivers have been told that it is over. */
  readonly state: 'waiting' | 'sending' | 'ended' | 'failed' | 'closed';
  readonly failure: NativeFailure | null;
  readonly counters: {
    /** With all headers above IP. */
    readonly sentBytes: bigint;
    readonly sentPages: bigint;
    /** Pages with data; 0 until the files have been looked at. */
    readonly pagesTotal: bigint;
    readonly sentDatagrams: bigint;
    /** The present rate of datagrams with their headers above UDP. */
    readonly rateBytesPerS: bigint;
    readonly cpuNs: bigint;
  };
  /** What receivers have said. One that has never said anything is not among them. */
  readonly members: readonly {
    readonly member: number;
    readonly receivedBytes: bigint;
    readonly lostDatagrams: bigint;
    /** As far as this receiver can know. */
    readonly sentDatagrams: bigint;
  }[];
}

/** Sends each page of an image that has data to a group, once: docs/PROTOCOL.md, "Multicast". */
export interface MulticastSenderHandle {
  /** The receivers should have joined. A sender that hears of no receiver for 2 s ends. */
  start(): void;
  snapshot(): MulticastSenderSnapshot;
  /** At any time; resolves when the thread has ended and the files are closed. */
  close(): Promise<void>;
}

/** What an image that is being read has got by multicast. */
export interface MulticastSnapshot {
  /**
   * `silent`: for 1 s nothing has come. It may go on within 10 s, and is over after that. `ended`: the sender has said
   * so, or the image is complete.
   */
  readonly state: 'none' | 'waiting' | 'receiving' | 'ended' | 'silent' | 'failed';
  readonly failure: NativeFailure | null;
  /** Of genuine datagrams, each once, with their headers above UDP. */
  readonly receivedBytes: bigint;
  readonly receivedDatagrams: bigint;
  /** Pages that came by multicast first. */
  readonly pages: bigint;
  readonly lostDatagrams: bigint;
  readonly repeatedDatagrams: bigint;
  /** Datagrams of other sessions, forged or senseless ones. */
  readonly rejectedDatagrams: bigint;
  /** Pages of which a part has not come in time. */
  readonly evictedPages: bigint;
  /** How many pages the sender has sent, from its end mark; 0 until then. */
  readonly sentPages: bigint;
}

export interface PacerOptions {
  /** 0 for no limit. */
  readonly bandwidthBytesPerS: number;
}

/** What one receiver has got so far: all values only grow. */
export interface PacerReport {
  /** Of the receiver; only differences count. */
  readonly clockNs: number;
  readonly highestSequence: number;
  readonly receivedDatagrams: number;
  readonly receivedBytes: number;
}

/** Decides how fast to send from what receivers report. It has no clock: `nowNs` is any time that never goes back. */
export interface PacerHandle {
  report(member: number, report: PacerReport, nowNs: number): void;
  rateBytesPerS(nowNs: number): number;
}

/** The counters of native sessions: a part of wire.ts. */

/**
 * Counters of a target session, in the order in which one call fills them. All are unsigned 64-bit. They only grow,
 * except for the three percentiles and the gauges, which are marked.
 */
export const TARGET_COUNTERS = [
  'pageCount',
  /** gauge */
  'pagesPresent',
  'pagesZero',
  'demandBytes',
  'prefetchBytes',
  /** Bytes fetched while the VM ran on the source. They are not in `prefetchBytes`. */
  'pushBytes',
  'faultCount',
  /** Faults on a page that another fetch had already claimed. */
  'faultOnClaimedCount',
  'faultP50Ns',
  'faultP99Ns',
  'faultMaxNs',
  'faultWaitNs',
  /** Time from start until the last window in which vCPUs waited for more than a tenth of it. */
  'degradedNs',
  'reconnectCount',
  /** Time from start until the last page was present; 0 until then. */
  'completedNs',
  'cpuNs',
] as const;
export type TargetCounter = (typeof TARGET_COUNTERS)[number];

export const SOURCE_COUNTERS = [
  'readCount',
  'readBytes',
  'dataPages',
  'zeroPages',
  'connections',
  'rejectedHellos',
  'cpuNs',
  /** For a clone: pages of 4 KiB that it has written, and how many of them have been copied to a file. */
  'ownPages',
  'ownPagesKept',
] as const;
export type SourceCounter = (typeof SOURCE_COUNTERS)[number];

/**
 * Counters of an image's capture, or of its transfer from another holder. All are unsigned 64-bit, and all but the
 * percentiles only grow.
 */
export const IMAGE_COUNTERS = [
  'pagesTotal',
  /** Pages copied with their bytes; together with `pagesZero` they add up to `pagesTotal`. */
  'pagesCopied',
  /** Pages that are holes in the parent's files: known to be zero, never copied. */
  'pagesZero',
  'copiedBytes',
  /** Writes of the parent that waited until their page was copied. */
  'parentFaultCount',
  'parentFaultP50Ns',
  'parentFaultP99Ns',
  'parentFaultMaxNs',
  'parentFaultWaitNs',
  /** Time from seal until the last window in which the parent waited for more than a tenth of it. */
  'parentDegradedNs',
  'cloneFaultCount',
  'cloneFaultP99Ns',
  /** Writes of the parent between arm and seal, which are recorded and allowed. */
  'notedFaultCount',
  /** Pages protected again by protect and seal. The length of the pause depends on their number. */
  'rearmedPages',
  'armNs',
  'protectNs',
  'sealNs',
  /** Time from seal until the image was complete; 0 until then. */
  'copyNs',
  /** Only in an image that is read from another holder: bytes that a clone waited for, and the others. */
  'demandBytes',
  'prefetchBytes',
  /** Bytes that came from near holders, whether a clone waited for them or not; the two above are those of the root. */
  'nearBytes',
  /** READs of a page that a clone waited for, of which a near holder said that it has not got the page yet. */
  'absentAnswers',
  /** Bytes of pages that a multicast has brought. */
  'multicastBytes',
  /** gauge: datagrams of a multicast that have not come yet */
  'multicastLostDatagrams',
  /** Bytes that bulk has asked the root for in the recorded order of first touches. */
  'orderedBytes',
  'reconnectCount',
  /** Pages that were not what their digests say, and were asked for again before anybody saw them. */
  'refusedPages',
  'cpuNs',
] as const;
export type ImageCounter = (typeof IMAGE_COUNTERS)[number];

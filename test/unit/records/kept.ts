/**
 * The expected contents of the kept records, by state directory. They were read from the files, but not by the code
 * under test.
 */

const MIB = 1 << 20;

/** Owner and epoch. */
export const ownersKept: Record<string, Record<string, string>> = {
  'filling/A': {
    shop: 'A 1',
    frozen: 'A 1',
    'own-0': 'A 1',
    big: 'A 1',
    other: 'A 1',
    'fill-1': 'A 1',
    'fill-0': 'A 1',
  },
  'forked/A': {
    shop: 'A 1',
    frozen: 'A 1',
    'shop-4eefea-1': 'A 1',
    'shop-4eefea-0': 'A 1',
    'again-0': 'A 1',
    'own-0': 'A 1',
    'frozen-6ec510-0': 'A 1',
    'shop-45aca5-0': 'A 1',
    'shop-45aca5-1': 'A 1',
  },
  'killed/A': { web: 'A 1', store: 'A 1', db: 'B 2', legacy: 'A 3', ended: 'A 1', late: 'A 1', half: 'B 2' },
  'killed/B': { db: 'B 2', legacy: 'A 3', half: 'B 2' },
  'uncommitted/A': {
    shop: 'A 1',
    frozen: 'A 1',
    'own-0': 'A 1',
    big: 'A 1',
    other: 'A 1',
    'fill-1': 'A 1',
    'fill-0': 'A 1',
    'early-1': 'A 1',
    'early-0': 'A 1',
  },
  'undone/A': { web: 'A 1', store: 'A 1', db: 'B 2', legacy: 'A 3', ended: 'A 1', late: 'A 1', half: 'B 2' },
};

/** Kind, VM, state, the numbers of steps that have begun and ended, and the steps that are left over. */
export const jobsKept: Record<string, Record<string, unknown[]>> = {
  'filling/A': {
    'job-e9c8f0ed0b8c': ['fork', 'shop', 'done', 0, 0],
    'job-cd99c2258cf6': ['fork', 'shop', 'done', 0, 0],
    'job-4818e53249b1': ['fork', 'shop', 'done', 0, 0],
    'job-0ca56fc08706': ['fork', 'frozen', 'done', 0, 0],
    'job-b079e546e9b1': ['fork', 'big', 'queued', 6, 4],
  },
  'forked/A': {
    'job-e9c8f0ed0b8c': ['fork', 'shop', 'done', 0, 0],
    'job-cd99c2258cf6': ['fork', 'shop', 'done', 0, 0],
    'job-4818e53249b1': ['fork', 'shop', 'done', 0, 0],
    'job-0ca56fc08706': ['fork', 'frozen', 'done', 0, 0],
  },
  'killed/A': {
    'job-b3e030a84106': ['migrate', 'db', 'done', 0, 0],
    'job-d2d2419636de': ['migrate', 'legacy', 'done', 0, 0],
    'job-c2c2795b1ce8': ['migrate', 'web', 'cancelled', 0, 0],
    'job-095628fb2c6f': ['migrate', 'half', 'queued', 9, 8],
    'job-517179dc8c02': ['migrate', 'late', 'queued', 8, 4],
  },
  'killed/B': {
    'job-ca4573ab8c32': ['migrate', 'legacy', 'done', 0, 0],
  },
  'uncommitted/A': {
    'job-e9c8f0ed0b8c': ['fork', 'shop', 'done', 0, 0],
    'job-cd99c2258cf6': ['fork', 'shop', 'done', 0, 0],
    'job-4818e53249b1': ['fork', 'shop', 'done', 0, 0],
    'job-0ca56fc08706': ['fork', 'frozen', 'done', 0, 0],
    'job-b079e546e9b1': ['fork', 'big', 'done', 0, 0],
    'job-8123dfc81a6d': ['fork', 'other', 'queued', 6, 0],
  },
  'undone/A': {
    'job-b3e030a84106': ['migrate', 'db', 'done', 0, 0],
    'job-d2d2419636de': ['migrate', 'legacy', 'done', 0, 0],
    'job-c2c2795b1ce8': ['migrate', 'web', 'cancelled', 0, 0],
    'job-095628fb2c6f': ['migrate', 'half', 'queued', 9, 8],
    'job-517179dc8c02': ['migrate', 'late', 'failed', 0, 0],
    'job-a70666e9a43b': ['migrate', 'late', 'failed', 8, 4, 'prepareTarget'],
  },
};

/** State, epoch, bytes of memory, memory files, image. */
export const vmsKept: Record<string, Record<string, unknown[]>> = {
  'filling/A': {
    big: ['running', 1, 640 * MIB, 1, null],
    'fill-0': ['incoming', 1, 640 * MIB, 1, '70a137ce2fd57e2e'],
    'fill-1': ['incoming', 1, 640 * MIB, 1, '70a137ce2fd57e2e'],
    frozen: ['stopped', 1, 96 * MIB, 1, null],
    other: ['running', 1, 96 * MIB, 1, null],
    'own-0': ['running', 1, 96 * MIB, 1, null],
    shop: ['running', 1, 96 * MIB, 1, null],
  },
  'forked/A': {
    'again-0': ['running', 1, 96 * MIB, 1, '4eefeac794b58112'],
    'frozen-6ec510-0': ['running', 1, 96 * MIB, 1, '6ec510b90adb1464'],
    frozen: ['stopped', 1, 96 * MIB, 1, null],
    'own-0': ['running', 1, 96 * MIB, 1, null],
    'shop-45aca5-0': ['incoming', 1, 96 * MIB, 1, '45aca5f08ff5aad2'],
    'shop-45aca5-1': ['incoming', 1, 96 * MIB, 1, '45aca5f08ff5aad2'],
    'shop-4eefea-0': ['running', 1, 96 * MIB, 1, '4eefeac794b58112'],
    'shop-4eefea-1': ['running', 1, 96 * MIB, 1, '4eefeac794b58112'],
    shop: ['running', 1, 96 * MIB, 1, null],
  },
  'killed/A': {
    ended: ['stopped', 1, 96 * MIB, 1, null],
    half: ['departed', 1, 160 * MIB, 1, null],
    late: ['departed', 1, 96 * MIB, 1, null],
    legacy: ['running', 3, 96 * MIB, 0, null],
    store: ['paused', 1, 96 * MIB, 1, null],
    web: ['running', 1, 96 * MIB, 1, null],
  },
  'killed/B': {
    db: ['running', 2, 96 * MIB, 2, null],
    half: ['running', 2, 160 * MIB, 1, null],
    late: ['incoming', 2, 96 * MIB, 1, null],
  },
  'uncommitted/A': {
    big: ['running', 1, 640 * MIB, 1, null],
    'early-0': ['incoming', 1, 96 * MIB, 1, '553c44f32fa92ec6'],
    'early-1': ['incoming', 1, 96 * MIB, 1, '553c44f32fa92ec6'],
    'fill-0': ['running', 1, 640 * MIB, 1, '70a137ce2fd57e2e'],
    'fill-1': ['running', 1, 640 * MIB, 1, '70a137ce2fd57e2e'],
    frozen: ['stopped', 1, 96 * MIB, 1, null],
    other: ['running', 1, 96 * MIB, 1, null],
    'own-0': ['running', 1, 96 * MIB, 1, null],
    shop: ['running', 1, 96 * MIB, 1, null],
  },
  'undone/A': {
    ended: ['stopped', 1, 96 * MIB, 1, null],
    half: ['departed', 1, 160 * MIB, 1, null],
    late: ['running', 1, 96 * MIB, 1, null],
    legacy: ['running', 3, 96 * MIB, 0, null],
    store: ['paused', 1, 96 * MIB, 1, null],
    web: ['running', 1, 96 * MIB, 1, null],
  },
};

/** State and parent. */
export const imagesKept: Record<string, Record<string, unknown[]>> = {
  'filling/A': {
    '240d278d455acd9b': ['complete', 'shop'],
    '4eefeac794b58112': ['complete', 'shop'],
    '6ec510b90adb1464': ['complete', 'frozen'],
    '70a137ce2fd57e2e': ['filling', 'big'],
  },
  'forked/A': {
    '240d278d455acd9b': ['complete', 'shop'],
    '45aca5f08ff5aad2': ['capturing', 'shop'],
    '4eefeac794b58112': ['complete', 'shop'],
    '6ec510b90adb1464': ['complete', 'frozen'],
  },
  'uncommitted/A': {
    '240d278d455acd9b': ['complete', 'shop'],
    '4eefeac794b58112': ['complete', 'shop'],
    '553c44f32fa92ec6': ['capturing', 'other'],
    '6ec510b90adb1464': ['complete', 'frozen'],
    '70a137ce2fd57e2e': ['complete', 'big'],
  },
};

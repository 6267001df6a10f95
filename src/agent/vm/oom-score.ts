/**
 * Whom the kernel ends when the host has no memory left (/proc/PID/oom_score_adj). Clones come first: they have been
 * promised more than there is. Other VMs keep the value that the daemon was started with. The daemon comes last,
 * because without it the pages of a VM that moves would not arrive.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import type { VmSpec } from '../../domain/vm.js';

const DAEMON_SCORE = -500;
const CLONE_SCORE = 700;

/** The value of this process at its start, which its children must get back. */
let startScore: string | null = null;

export function protectDaemon(): void {
  attempt(() => {
    startScore ??= readFileSync('/proc/self/oom_score_adj', 'utf8').trim();
    writeFileSync('/proc/self/oom_score_adj', String(Math.min(DAEMON_SCORE, Number(startScore))));
  });
}

/** Sets the score of the VM's new process. */
export function setOomScore(pid: number, { memory }: VmSpec): void {
  const score = memory.backing === 'image' ? String(CLONE_SCORE) : startScore;
  if (score !== null) attempt(() => writeFileSync(`/proc/${pid}/oom_score_adj`, score));
}

/** Ignores errors: a process without the right to lower its score keeps it. */
function attempt(change: () => void): void {
  try {
    change();
  } catch {
    // It is not permitted, or the process has ended.
  }
}

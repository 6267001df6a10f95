import type { DoctorCheck } from '../../schemas/host.js';

/** What one check of the doctor has found. */
export type Verdict = Omit<DoctorCheck, 'name'>;

export const ok = (text: string): Verdict => ({ status: 'ok', text, remedy: '' });
export const warn = (text: string, remedy: string): Verdict => ({ status: 'warn', text, remedy });
export const fail = (text: string, remedy: string): Verdict => ({ status: 'fail', text, remedy });

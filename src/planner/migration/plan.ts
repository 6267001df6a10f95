/**
 * Plans a migration: turns request and inventories into typed steps, without side effects. The engine walks exactly
 * these steps, and `--dry-run` prints them.
 */

import type { HostInventory, VmInventory } from '../../domain/host.js';
import {
  bringsAllFirst,
  type MigrationMode,
  type MigrationOrder,
  type MigrationPlan,
  MODE_TRAITS,
  type PlanStep,
  type StepName,
} from '../../domain/migration.js';
import type { Refusal } from '../../domain/refusal.js';
import { transportRow } from '../../domain/transport.js';
import { describeBytes } from '../bytes.js';
import { estimate } from './estimate.js';
import type { PreflightFacts } from './facts.js';
import { preflight } from './preflight.js';
import { storageNotes } from './storage.js';
import { type Choice, chooseTransport, protectionOf } from './transport.js';

const UNTIL_CONNECTED = ['reserve', 'prepareTarget', 'exposeSource', 'connectTarget'] as const;
const FROM_STATE_ON = ['transferState', 'commit', 'resumeTarget', 'drain', 'verifyMemory', 'releaseSource'] as const;
const NATIVE_UNTIL_RESUMED = [
  'reserve',
  'prepareTarget',
  'nativeStart',
  'nativeSwitchover',
  'commit',
  'resumeTarget',
] as const;

/** The steps of each mode, in order. `verifyMemory` is only in the plan of an order that asks for it. */
export const STEPS_OF_MODE: Readonly<Record<MigrationMode, readonly StepName[]>> = {
  postcopy: [...UNTIL_CONNECTED, 'stopSource', ...FROM_STATE_ON],
  hybrid: [...UNTIL_CONNECTED, 'push', 'stopSource', ...FROM_STATE_ON],
  precopy: [...UNTIL_CONNECTED, 'push', 'stopSource', 'pushLast', ...FROM_STATE_ON],
  'native-precopy': [...NATIVE_UNTIL_RESUMED, 'releaseSource'],
  'native-postcopy': [...NATIVE_UNTIL_RESUMED, 'drain', 'releaseSource'],
};

/**
 * The steps that must come before each step. `all` must be in the plan; `ifPlanned` count only if they are. `commit`
 * lists both ways of moving the device state to the target under `ifPlanned`, because a plan has one of them.
 */
export const PREREQUISITES: Readonly<Record<StepName, { all: readonly StepName[]; ifPlanned: readonly StepName[] }>> = {
  reserve: { all: [], ifPlanned: [] },
  prepareTarget: { all: ['reserve'], ifPlanned: [] },
  exposeSource: { all: ['reserve'], ifPlanned: [] },
  connectTarget: { all: ['prepareTarget', 'exposeSource'], ifPlanned: [] },
  push: { all: ['connectTarget'], ifPlanned: [] },
  stopSource: { all: ['connectTarget'], ifPlanned: ['push'] },
  pushLast: { all: ['push', 'stopSource'], ifPlanned: [] },
  transferState: { all: ['stopSource'], ifPlanned: ['pushLast'] },
  nativeStart: { all: ['prepareTarget'], ifPlanned: [] },
  nativeSwitchover: { all: ['nativeStart'], ifPlanned: [] },
  commit: { all: ['prepareTarget'], ifPlanned: ['transferState', 'nativeSwitchover'] },
  resumeTarget: { all: ['commit'], ifPlanned: [] },
  drain: { all: ['resumeTarget'], ifPlanned: [] },
  verifyMemory: { all: ['drain'], ifPlanned: [] },
  releaseSource: { all: ['resumeTarget'], ifPlanned: ['drain', 'verifyMemory'] },
};

export const PLAN_STEPS_AFTER_COMMIT: readonly StepName[] = ['resumeTarget', 'drain', 'verifyMemory', 'releaseSource'];

/**
 * Returns the first step that comes twice or before one of its prerequisites, or null. The engine refuses a plan that
 * has one.
 */
export function firstStepOutOfOrder(steps: readonly { readonly name: StepName }[]): StepName | null {
  const names = steps.map(({ name }) => name);
  const before = new Set<StepName>();
  for (const name of names) {
    const { all, ifPlanned } = PREREQUISITES[name];
    const needed = [...all, ...ifPlanned.filter((step) => names.includes(step))];
    if (before.has(name) || needed.some((step) => !before.has(step))) return name;
    before.add(name);
  }
  if (!before.has('commit')) return 'commit';
  return before.has('transferState') || before.has('nativeSwitchover') ? null : 'commit';
}

/**
 * Deadlines. They are the only way to notice a silent target. Deadlines of steps during which the VM is stopped are
 * below 5 s, because the VM must run again within 5 s after a failure. stopSource may take longer: the VM runs during
 * most of it. pushLast takes as long as the request allows the VM to stand still. 0 means no deadline, where giving up
 * would be worse than waiting: after a deadline the outcome of commit would be unknown; during push, drain and
 * verifyMemory the engine watches for progress instead.
 */
const TIMEOUT_MS: { readonly [Name in StepName]: number } = {
  reserve: 5_000,
  prepareTarget: 30_000,
  exposeSource: 10_000,
  connectTarget: 10_000,
  push: 0,
  stopSource: 8_000,
  pushLast: 0,
  transferState: 3_500,
  commit: 0,
  resumeTarget: 5_000,
  drain: 0,
  verifyMemory: 0,
  releaseSource: 30_000,
  nativeStart: 0,
  nativeSwitchover: 3_500,
};

/**
 * The steps in which an RDMA device registers the VM's memory. A slow machine allocates, clears and locks it at this
 * rate, while the VM runs.
 */
const REGISTERING_STEPS: readonly StepName[] = ['exposeSource', 'connectTarget'];
const REGISTERED_BYTES_PER_S = 2 ** 28;

/** QEMU's pre-copy may never converge, so its deadline is the time of this many passes over the memory. */
const NATIVE_PASSES_MAX = 20;
const NATIVE_MS_MIN = 600_000;

export type Planning =
  | { readonly plan: MigrationPlan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

/** Returns either a plan or all reasons against it. */
export function planMigration(order: MigrationOrder, facts: PreflightFacts): Planning {
  const choice = chooseTransport(order, facts);
  const refusals = preflight({ ...order, transport: choice.transport }, facts);
  if (refusals.length > 0 || facts.target.kind !== 'reachable') return { plan: null, refusals };
  const { target, sourceHost } = facts;
  const ends = { source: sourceHost, target: target.inventory, dataSecurity: order.dataSecurity };
  const { dataSecurity: _, ...asked } = order;
  const dataSecurity = protectionOf(choice.transport, order.mode, ends);
  const protectedOrder = dataSecurity === undefined ? asked : { ...asked, dataSecurity };
  const planned = plan(protectedOrder, choice, sourceHost, facts.vm);
  const notes = [...storageNotes(planned.request, facts.target.storage), ...planned.notes];
  return { plan: { ...planned, notes }, refusals: [] };
}

function plan(order: MigrationOrder, choice: Choice, sourceHost: HostInventory, vm: VmInventory): MigrationPlan {
  const request = { ...order, transport: choice.transport };
  const memoryBytes = vm.spec.memory.sizeBytes;
  const { moveMs, notes } = estimate(request, memoryBytes);
  const ownTimeoutMs: { readonly [Name in StepName]?: number } = {
    nativeStart: Math.max(NATIVE_MS_MIN, NATIVE_PASSES_MAX * moveMs),
    pushLast: request.downtimeMsMax,
  };
  const registerMs = transportRow(choice.transport).registersMemory ? (memoryBytes * 1000) / REGISTERED_BYTES_PER_S : 0;
  const source = sourceHost.host;
  const { vm: name, target, transport, mode } = request;
  const names = { vm: name, source, target, transport, mode, memory: describeBytes(memoryBytes) };
  const planned = STEPS_OF_MODE[mode].filter((step) => step !== 'verifyMemory' || request.verifyMemory === true);
  const steps = planned.map((step): PlanStep => {
    const { at, isInBlackout, text } = DESCRIPTIONS[step];
    return {
      name: step,
      host: at === 'target' ? target : source,
      text: text(names),
      isInBlackout: isInBlackout === true,
      timeoutMs: ownTimeoutMs[step] ?? TIMEOUT_MS[step] + (REGISTERING_STEPS.includes(step) ? registerMs : 0),
    };
  });
  return { request, transportReason: choice.reason, source, memoryBytes, steps, notes };
}

interface StepDescription {
  readonly at: 'source' | 'target';
  readonly isInBlackout?: true;
  readonly text: (names: {
    readonly vm: string;
    readonly source: string;
    readonly target: string;
    readonly transport: string;
    readonly mode: MigrationMode;
    readonly memory: string;
  }) => string;
}

const DESCRIPTIONS: { readonly [Name in StepName]: StepDescription } = {
  reserve: { at: 'source', text: ({ vm, source }) => `reserve ${vm} on ${source} for this job` },
  prepareTarget: {
    at: 'target',
    text: ({ vm, target, memory }) => `start an empty QEMU for ${vm} on ${target} with ${memory} of memory`,
  },
  exposeSource: {
    at: 'source',
    text: ({ vm, source, transport }) =>
      `expose the memory of ${vm} on ${source} over ${transport} to this session only`,
  },
  connectTarget: {
    at: 'target',
    text: ({ target, transport }) => `connect ${target} to that memory over ${transport}`,
  },
  push: {
    at: 'target',
    text: ({ vm, source, mode }) =>
      `fetch the memory while ${vm} runs on ${source}, and again what it writes meanwhile, ` +
      (bringsAllFirst(mode) ? 'until the rest fits in the downtime' : 'while that pays'),
  },
  stopSource: {
    at: 'source',
    isInBlackout: true,
    text: ({ vm, source }) => `stop ${vm} on ${source} and freeze its memory`,
  },
  pushLast: {
    at: 'target',
    isInBlackout: true,
    text: ({ vm, source }) => `fetch what ${vm} has written on ${source} last`,
  },
  transferState: {
    at: 'source',
    isInBlackout: true,
    text: ({ source, target }) => `move the device state from ${source} to ${target}`,
  },
  commit: {
    at: 'source',
    isInBlackout: true,
    text: ({ vm, target }) => `commit: from here on ${vm} belongs to ${target}`,
  },
  resumeTarget: { at: 'target', isInBlackout: true, text: ({ vm, target }) => `resume ${vm} on ${target}` },
  drain: {
    at: 'target',
    text: ({ source, mode }) =>
      MODE_TRAITS[mode].mover === 'backend'
        ? `QEMU fetches the rest of the memory from ${source}`
        : bringsAllFirst(mode)
          ? 'map the memory, all of which is here'
          : `fetch the memory from ${source}; pages that the guest waits for come first`,
  },
  verifyMemory: {
    at: 'target',
    text: ({ source }) => `prove that the memory is what it was on ${source}, which has kept it`,
  },
  releaseSource: {
    at: 'source',
    text: ({ vm, source }) => `end QEMU on ${source} and free the memory of ${vm} there`,
  },
  nativeStart: {
    at: 'source',
    text: ({ vm, source, target, mode }) =>
      `QEMU on ${source} moves ${vm} to ${target} (${mode}) and stops it at the end`,
  },
  nativeSwitchover: {
    at: 'target',
    isInBlackout: true,
    text: ({ vm, target }) => `wait until QEMU on ${target} has all the state it needs to run ${vm}`,
  },
};

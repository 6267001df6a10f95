import { describe, expect, test } from 'vitest';
import type { DataSecurity } from '../../../src/domain/data-security.js';
import type { MigrationOrder } from '../../../src/domain/migration.js';
import { planFanout } from '../../../src/planner/fork/fanout.js';
import { planMigration } from '../../../src/planner/migration/plan.js';
import { forkInventory, forkRequest } from './fork-facts.js';
import { goodFacts, request } from './planner-facts.js';

interface Demands {
  readonly source?: DataSecurity;
  /** Null: a host of an earlier build. */
  readonly target?: DataSecurity | null;
  readonly asked?: DataSecurity;
  readonly order?: Partial<MigrationOrder>;
  readonly isRdmaTrusted?: boolean;
}

function planned({ source = 'integrity', target = 'integrity', asked, order = {}, isRdmaTrusted = false }: Demands) {
  const good = goodFacts();
  const { dataSecurity: _, ...older } = good.target.inventory;
  const trust = isRdmaTrusted ? { rdmaTrust: 'trusted' as const } : {};
  const facts = {
    ...good,
    sourceHost: { ...good.sourceHost, ...trust, dataSecurity: source },
    target: {
      ...good.target,
      inventory: { ...older, ...trust, ...(target === null ? {} : { dataSecurity: target }) },
    },
  };
  const given = { ...request, ...order, ...(asked === undefined ? {} : { dataSecurity: asked }) };
  const { plan, refusals } = planMigration(given, facts);
  return {
    request: plan?.request,
    codes: refusals.map(({ code }) => code),
    remedies: refusals.map((one) => one.remedy),
  };
}

describe('the protection of a move', () => {
  test.each([
    [{}, 'integrity'],
    [{ source: 'none', target: 'none' }, 'none'],
    [{ source: 'none', target: 'none', asked: 'encrypt' }, 'encrypt'],
    [{ source: 'encrypt', asked: 'none' }, 'encrypt'],
    [{ target: 'encrypt' }, 'encrypt'],
    [{ asked: 'none' }, 'integrity'],
  ] satisfies [Demands, DataSecurity][])('%j is the strongest that anybody demands: %s', (demands, expected) => {
    expect(planned({ ...demands, order: { transport: 'tcp' } }).request?.dataSecurity).toBe(expected);
  });

  test('is not said of a transport whose bytes a device moves', () => {
    expect(planned({ order: { transport: 'rdma' } }).request).not.toHaveProperty('dataSecurity');
  });

  test('by encryption refuses RDMA, unless both hosts trust its network, and auto takes tcp', () => {
    for (const demands of [{ asked: 'encrypt' }, { source: 'encrypt' }, { target: 'encrypt' }] satisfies Demands[]) {
      const refused = planned({ ...demands, order: { transport: 'rdma' } });
      expect(refused.codes).toEqual(['DATA_NOT_PROTECTED']);
      expect(refused.remedies[0]).toMatch(/--tcp.*security\.rdma/);
      expect(planned({ ...demands, order: { transport: 'auto' } }).request).toMatchObject({
        transport: 'tcp',
        dataSecurity: 'encrypt',
      });
      expect(planned({ ...demands, order: { transport: 'rdma' }, isRdmaTrusted: true }).codes).toEqual([]);
    }
  });

  test('by encryption holds for QEMU’s own stream, which a host of an earlier build takes from anybody', () => {
    const order = { mode: 'native-precopy', transport: 'tcp' } as const;
    expect(planned({ asked: 'encrypt', order })).toMatchObject({ request: { dataSecurity: 'encrypt' }, codes: [] });
    expect(planned({ target: null, order }).codes).toEqual(['DATA_NOT_PROTECTED']);
  });

  test('that is asked for is refused where a host cannot give it', () => {
    for (const asked of ['integrity', 'encrypt'] as const) {
      expect(planned({ asked, target: null, order: { transport: 'tcp' } }).codes).toEqual(['DATA_NOT_PROTECTED']);
      expect(planned({ asked, order: { transport: 'rdma' } }).codes).toEqual(['DATA_NOT_PROTECTED']);
    }
    const older = planned({ target: null, order: { transport: 'tcp' } });
    expect(older.codes).toEqual([]);
    // That host refuses a call with a key that it does not know.
    expect(older.request).not.toHaveProperty('dataSecurity');
  });

  test('by encryption sends no multicast', () => {
    const question = {
      ...{ root: 'A', hosts: ['B', 'C', 'D', 'E', 'F'], transport: 'tcp' as const, inventory: forkInventory },
      ...{ topology: null, probes: [], isEncrypted: true },
    };
    const asked = planFanout({ ...forkRequest, fanout: 'multicast' }, question);
    expect(asked.refusals.map(({ code }) => code)).toEqual(['DATA_NOT_PROTECTED']);
    expect(planFanout(forkRequest, question).plan?.kind).toBe('unicast');
  });
});

import { describe, expect, test } from 'vitest';
import type { DataSecurity } from '../../../src/domain/data-security.js';
import type { MigrationOrder } from '../../../src/domain/migration.js';
import { planFanout } from '../../../src/planner/fork/fanout.js';
import { planMigration } from '../../../src/planner/migration/plan.js';
import { forkInventory, forkRequest } from './fork-facts.js';
import { goodFacts, request } from './planner-facts.js';

interface Demands {
  readonly source?: DataSecurity;
  readonly target?: DataSecurity;
  readonly asked?: DataSecurity;
  readonly order?: Partial<MigrationOrder>;
  readonly isRdmaTrusted?: boolean;
}

function planned({ source = 'integrity', target = 'integrity', asked, order = {}, isRdmaTrusted = false }: Demands) {
  const good = goodFacts();
  const trust = isRdmaTrusted ? { rdmaTrust: 'trusted' as const } : {};
  const facts = {
    ...good,
    sourceHost: { ...good.sourceHost, ...trust, dataSecurity: source },
    target: { ...good.target, inventory: { ...good.target.inventory, ...trust, dataSecurity: target } },
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
      expect(refused.codes).toEqual(['DATA_NOT_ENCRYPTED']);
      expect(refused.remedies[0]).toMatch(/--tcp.*security\.rdma/);
      expect(planned({ ...demands, order: { transport: 'auto' } }).request).toMatchObject({
        transport: 'tcp',
        dataSecurity: 'encrypt',
      });
      expect(planned({ ...demands, order: { transport: 'rdma' }, isRdmaTrusted: true }).codes).toEqual([]);
    }
  });

  test('by encryption refuses QEMU’s own stream', () => {
    const order = { mode: 'native-precopy', transport: 'tcp' } as const;
    expect(planned({ asked: 'encrypt', order }).codes).toEqual(['DATA_NOT_ENCRYPTED']);
    expect(planned({ order }).codes).toEqual([]);
  });

  test('by encryption sends no multicast', () => {
    const question = {
      ...{ root: 'A', hosts: ['B', 'C', 'D', 'E', 'F'], transport: 'tcp' as const, inventory: forkInventory },
      ...{ topology: null, probes: [], isEncrypted: true },
    };
    const asked = planFanout({ ...forkRequest, fanout: 'multicast' }, question);
    expect(asked.refusals.map(({ code }) => code)).toEqual(['DATA_NOT_ENCRYPTED']);
    expect(planFanout(forkRequest, question).plan?.kind).toBe('unicast');
  });
});

/**
 * The terms of a fan-out as types: how the image of a fork gets to the hosts that join it. Imports nothing; every layer
 * may import it.
 *
 * unicast: each host reads every page from the root. multicast: the root sends each page once to a group, and the hosts
 * repair what they have lost from each other. tree: a host reads from a host nearer than the root, which reads from the
 * next, along the topology. In all of them the root is the last resort.
 */
export const FANOUTS = ['unicast', 'multicast', 'tree'] as const;
export type Fanout = (typeof FANOUTS)[number];

export const FANOUT_CHOICES = ['auto', ...FANOUTS] as const;
export type FanoutChoice = (typeof FANOUT_CHOICES)[number];

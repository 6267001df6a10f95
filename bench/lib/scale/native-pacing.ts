import { loadNativeBinding } from '../../../src/native/binding.js';
import type { Pacing } from './pacing.js';

/** The pacing of a real sender. Throws UNSUPPORTED if the addon is not built. */
export function pacingOfAddon(): Pacing {
  const native = loadNativeBinding();
  return { name: 'the native pacing', open: () => native.openPacer({ bandwidthBytesPerS: 0 }) };
}

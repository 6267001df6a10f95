import { loadNativeBinding } from '../../../src/native/binding.js';
import { type Pacer, type Pacing, standInPacing } from './pacing.js';

/** The part of the addon that the model needs. */
interface PacingAddon {
  readonly openPacer: (options: { readonly bandwidthBytesPerS: number }) => Pacer;
}

/** The pacing of a real sender, or the stand-in where the addon is not built or has none. */
export function pacingOfAddon(): Pacing {
  try {
    const addon: Partial<PacingAddon> = loadNativeBinding() as object;
    const { openPacer } = addon;
    if (openPacer === undefined) return standInPacing;
    return { name: 'the native pacing', open: () => openPacer({ bandwidthBytesPerS: 0 }) };
  } catch {
    return standInPacing;
  }
}

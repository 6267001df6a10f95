/** The flags that choose a transport (`--tcp` and so on), one for each. */
import { type Command, Option } from 'commander';
import { TRANSPORTS, type Transport, type TransportChoice, transportRow } from '../domain/transport.js';

export type TransportOptions = { readonly [T in Transport]?: boolean };

/**
 * Adds a flag for each transport. `helpOf` returns the help text of a flag. `native` is the flag of QEMU's own
 * migration, which not every transport carries.
 */
export function addTransportOptions(
  program: Command,
  helpOf: (transport: Transport) => string = (transport) => transportRow(transport).help,
): Command {
  for (const transport of TRANSPORTS) {
    const others: string[] = TRANSPORTS.filter((other) => other !== transport);
    if (!transportRow(transport).carriesBackendMoves) others.push('native');
    program.addOption(new Option(`--${transport}`, helpOf(transport)).conflicts(others));
  }
  return program;
}

export function chosenTransport(options: TransportOptions): TransportChoice {
  return TRANSPORTS.find((transport) => options[transport] === true) ?? 'auto';
}

/** The flags that choose a transport (`--tcp` and so on), one for each, and how it protects what it carries. */
import { type Command, Option } from 'commander';
import { DATA_SECURITIES, type DataSecurity } from '../domain/data-security.js';
import { ALL_TRANSPORTS, type Transport, type TransportChoice, transportRow } from '../domain/transport.js';

export type TransportOptions = { readonly [T in Transport]?: boolean } & { readonly dataSecurity?: DataSecurity };

/**
 * Adds a flag for each transport. `helpOf` returns the help text of a flag. `native` is the flag of QEMU's own
 * migration, which not every transport carries.
 */
export function addTransportOptions(
  program: Command,
  helpOf?: (transport: Transport) => string,
  table = ALL_TRANSPORTS,
): Command {
  const transports = Object.keys(table) as Transport[];
  for (const transport of transports) {
    const row = transportRow(transport, table);
    const others: string[] = transports.filter((other) => other !== transport);
    // A flag that asks for a device is a mistake of usage; pre-flight refuses the others.
    if (row.registersMemory && !row.carriesBackendMoves) others.push('native');
    program.addOption(new Option(`--${transport}`, helpOf?.(transport) ?? row.help).conflicts(others));
  }
  return program.addOption(
    new Option(
      '--data-security <mode>',
      'the least protection of memory on its way over TCP: none, integrity, or encrypt (TLS 1.3); default: what both ' +
        'hosts demand',
    ).choices(DATA_SECURITIES),
  );
}

/** What the user demands, for a request's body. */
export function chosenSecurity({ dataSecurity }: TransportOptions): { dataSecurity?: DataSecurity } {
  return dataSecurity === undefined ? {} : { dataSecurity };
}

export function chosenTransport(options: TransportOptions, table = ALL_TRANSPORTS): TransportChoice {
  return (Object.keys(table) as Transport[]).find((transport) => options[transport] === true) ?? 'auto';
}

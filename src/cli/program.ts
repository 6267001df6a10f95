/** Shared by vmctl, vmigrate and vfork: common options, the connection to the daemon, and how a command ends. */
import { readFileSync } from 'node:fs';
import { Command, CommanderError } from 'commander';
import { ApiClient, DEFAULT_HOST } from '../api/client.js';
import { MigrationError } from '../domain/errors.js';
import { EXIT, type ExitCode } from './exit-codes.js';
import { printError } from './terminal.js';
import { VERSION } from './version.js';

export interface CommonOptions {
  readonly host?: string;
  readonly tls?: string;
  readonly tokenFile?: string;
  readonly json?: boolean;
}

/** Creates a command. Its common options (--host, --tls, --json) may stand before or after a subcommand. */
export function newProgram(name: string, description: string): Command {
  return new Command(name)
    .description(description)
    .version(VERSION, '--version', 'print the version')
    .option('--host <url>', 'address of the daemon: unix:PATH or https://ADDRESS:PORT (or set VMIGRATE_HOST)')
    .option('--tls <dir>', 'certificate folder for https (or set VMIGRATE_TLS)')
    .option('--token-file <file>', 'token for https, instead of a certificate (or set VMIGRATE_TOKEN to the token)')
    .option('--json', 'print one JSON document on stdout and nothing else')
    .configureHelp({ showGlobalOptions: true })
    .exitOverride();
}

export function client(options: CommonOptions): ApiClient {
  return new ApiClient({
    host: options.host ?? process.env.VMIGRATE_HOST ?? DEFAULT_HOST,
    tls: options.tls ?? process.env.VMIGRATE_TLS ?? null,
    token: tokenOf(options),
  });
}

/** The command line is no place for a secret: everybody on the machine can read it. */
function tokenOf({ tokenFile }: CommonOptions): string | null {
  if (tokenFile === undefined) return process.env.VMIGRATE_TOKEN ?? null;
  try {
    return readFileSync(tokenFile, 'utf8').trim();
  } catch (cause) {
    throw new MigrationError('USAGE', `cannot read the token file ${tokenFile}`, { cause });
  }
}

/**
 * Runs the program and sets the exit code. A command that ends without an error has stored its code in `outcome`.
 */
export async function main(program: Command, outcome: { code: ExitCode }): Promise<void> {
  const isJson = process.argv.includes('--json');
  // It is no error if the reader of stdout goes away (`| head`).
  process.stdout.on('error', () => process.exit(outcome.code));
  let code: ExitCode;
  try {
    await program.parseAsync();
    code = outcome.code;
  } catch (error) {
    code =
      error instanceof CommanderError
        ? usage(program.name(), isJson, error)
        : printError(program.name(), { isJson }, error);
  }
  // process.exit would lose what is still in a pipe.
  process.exitCode = code;
}

function usage(name: string, isJson: boolean, error: CommanderError): ExitCode {
  if (error.exitCode === 0) return EXIT.done; // --help, --version
  // Commander has written its message to stderr already.
  if (isJson) printError(name, { isJson }, new MigrationError('USAGE', error.message.replace(/^error: /, '')));
  return EXIT.usage;
}

export function integer(name: string, min: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || !Number.isSafeInteger(value) || value < min)
      throw new MigrationError('USAGE', `${name} must be a whole number of at least ${min}, not "${text}"`);
    return value;
  };
}

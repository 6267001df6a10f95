/** `vmctl whoami` and `vmctl token …`: the bearer tokens of a host. */
import { type Command, Option } from 'commander';
import { USER_ROLES, type UserRole } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';
import type { TokenView } from '../domain/token.js';
import { parseDuration } from '../kit/duration.js';
import type { CallerView } from '../schemas/token.js';
import { type CommonOptions, client } from './program.js';
import { plain, table } from './render.js';
import { print } from './terminal.js';

interface CreateOptions extends CommonOptions {
  readonly role: UserRole;
  readonly expires: string;
  readonly name: string;
}

/** For `vmctl certs user`, too. */
export function roleOption(): Option {
  return new Option('--role <role>', 'viewer looks; operator also runs, stops, moves and forks VMs; admin may do all')
    .choices(USER_ROLES)
    .default('operator');
}

export function addTokens(program: Command): void {
  const output = (options: CommonOptions) => ({ isJson: options.json === true });
  program
    .command('whoami')
    .description('show as whom this host knows you, and what you may do')
    .action(async (_: unknown, command: Command) => {
      const options = command.optsWithGlobals<CommonOptions>();
      const caller = await client(options).get<CallerView>('/v1/whoami');
      print(output(options), caller, ({ host, name, role }) => plain(`${name} on ${host}: ${role}`).concat('\n'));
    });

  const tokens = program.command('token').description('tokens for clients of this host that have no certificate');
  tokens
    .command('create')
    .description('make a token, and print it this once; the host keeps only a hash of it')
    .requiredOption('--name <name>', 'whom it is for; the audit log has this name')
    .addOption(roleOption())
    .option('--expires <duration>', 'how long it is valid: a number with s, m, h or d', '30d')
    .addHelpText(
      'after',
      '\nUse it with --token-file FILE or VMIGRATE_TOKEN, and with --tls DIR, which holds ca.pem and crl.pem:\n' +
        '  vmctl token create --name ci --role operator --expires 30d > ci.token\n' +
        '  vmctl --host https://192.0.2.1:7400 --tls DIR --token-file ci.token ps\n',
    )
    .action(async (_: unknown, command: Command) => {
      const options = command.optsWithGlobals<CreateOptions>();
      const expiresInMs = parseDuration(options.expires);
      if (Number.isNaN(expiresInMs))
        throw new MigrationError('USAGE', `--expires is a number with s, m, h or d, not "${options.expires}"`);
      const body = { name: options.name, role: options.role, expiresInMs };
      const made = await client(options).post<TokenView & { token: string }>('/v1/tokens', body);
      if (options.json !== true)
        process.stderr.write(
          `token ${made.name}: ${made.role}, valid until ${made.expiresAt}; it is not shown again\n`,
        );
      print(output(options), made, ({ token }) => `${token}\n`);
    });
  tokens
    .command('list')
    .description('list the tokens of this host')
    .action(async (_: unknown, command: Command) => {
      const options = command.optsWithGlobals<CommonOptions>();
      print(output(options), await client(options).get<TokenView[]>('/v1/tokens'), tokenTable);
    });
  tokens
    .command('revoke <name>')
    .description('make a token worthless, by its name or id')
    .action(async (name: string, _: unknown, command: Command) => {
      const options = command.optsWithGlobals<CommonOptions>();
      const revoked = await client(options).delete<TokenView[]>(`/v1/tokens/${encodeURIComponent(name)}`);
      print(output(options), revoked, (list) => list.map((token) => `revoked ${plain(token.name)}\n`).join(''));
    });
}

function tokenTable(tokens: readonly TokenView[]): string {
  const rows = tokens.map(({ name, role, expiresAt, createdBy, id }) => [
    ...[name, role, Date.parse(expiresAt) < Date.now() ? 'expired' : 'valid'],
    ...[expiresAt, createdBy, id],
  ]);
  return table(['NAME', 'ROLE', 'STATE', 'EXPIRES', 'MADE BY', 'ID'], rows);
}

/** `vmctl certs`: manages the cluster's certificates. It works on folders and needs no daemon. */
import { X509Certificate } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { isIP } from 'node:net';
import { join } from 'node:path';
import type { Command } from 'commander';
import type { UserRole } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';
import type { Issued } from '../tls/authority.js';
import { table } from './render.js';
import { print } from './terminal.js';
import { roleOption } from './vmctl-token.js';

interface CertsOptions {
  readonly json?: boolean;
  readonly name?: string;
  readonly role?: UserRole;
  readonly address?: string[];
  readonly dir?: string;
  readonly out?: string;
}

const collect = (value: string, previous: string[] = []): string[] => [...previous, value];
const output = (command: Command) => ({ isJson: command.optsWithGlobals<CertsOptions>().json === true });

function issuedText(issued: Issued): string {
  const role = issued.userRole === undefined ? '' : ` (${issued.userRole})`;
  return `${issued.role}/${issued.name}${role}: valid until ${issued.expiresAt}, serial ${issued.serial}\n`;
}

async function show(directory: string): Promise<readonly Issued[]> {
  const { Authority } = await import('../tls/authority.js');
  try {
    return (await Authority.open(directory)).issued;
  } catch (error) {
    if (!(error instanceof MigrationError) || error.code !== 'NOT_FOUND') throw error;
  }
  const [pem, list] = await Promise.all(
    ['cert.pem', 'crl.pem'].map((file) => readFile(join(directory, file), 'utf8')),
  ).catch((cause: unknown) => {
    throw new MigrationError('NOT_FOUND', `${directory} is neither the folder of a CA nor that of a host`, { cause });
  });
  const [{ revokedSerials, normalizeSerial }, { parseCommonName, roleIn }] = await Promise.all([
    import('../tls/crl.js'),
    import('../tls/identity.js'),
  ]);
  const certificate = new X509Certificate(pem ?? '');
  const identity = parseCommonName(/^CN=(.*)$/m.exec(certificate.subject)?.[1]);
  if (identity === null)
    throw new MigrationError('CORRUPT', `the name in ${directory}/cert.pem is not host/NAME or user/NAME`);
  const serial = normalizeSerial(certificate.serialNumber);
  return [
    {
      ...identity,
      ...(identity.role === 'host' ? {} : { userRole: roleIn(certificate.subject) }),
      serial,
      addresses: (certificate.subjectAltName ?? '').split(', ').filter((entry) => entry !== ''),
      expiresAt: new Date(certificate.validTo).toISOString(),
      revokedAt: revokedSerials(list ?? '').has(serial) ? 'revoked' : null,
    },
  ];
}

export function addCerts(program: Command): void {
  const certs = program.command('certs').description('the cluster’s certificate authority and its certificates');

  certs
    .command('init <dir>')
    .description('create a certificate authority')
    .option('--name <cluster>', 'the cluster’s name', 'cluster')
    .action(async (directory: string, options: CertsOptions, command: Command) => {
      const { Authority } = await import('../tls/authority.js');
      const { cluster } = await Authority.create(directory, options.name ?? 'cluster');
      print(
        output(command),
        { cluster, directory },
        () => `created the certificate authority of ${cluster} in ${directory}\n`,
      );
    });

  certs
    .command('host <name>')
    .description('create a key and a certificate for the daemon of a host')
    .requiredOption('--address <ip>', 'address at which the host serves its API; may be repeated', collect)
    .requiredOption('--dir <ca_dir>', 'folder of the certificate authority')
    .requiredOption('--out <dir>', 'folder for the host’s files')
    .action(async (name: string, options: CertsOptions, command: Command) => {
      const { Authority } = await import('../tls/authority.js');
      const addresses = options.address ?? [];
      const wrong = addresses.find((address) => isIP(address) === 0 && !/^[A-Za-z0-9.-]+$/.test(address));
      if (wrong !== undefined) throw new MigrationError('USAGE', `"${wrong}" is not an address`);
      const authority = await Authority.open(options.dir ?? '');
      print(output(command), await authority.issue({ role: 'host', name }, addresses, options.out ?? ''), issuedText);
    });

  certs
    .command('user <name>')
    .description('create a key and a certificate for an API client')
    .addOption(roleOption())
    .requiredOption('--dir <ca_dir>', 'folder of the certificate authority')
    .requiredOption('--out <dir>', 'folder for the user’s files')
    .action(async (name: string, options: CertsOptions, command: Command) => {
      const { Authority } = await import('../tls/authority.js');
      const authority = await Authority.open(options.dir ?? '');
      const identity = { role: 'user', name, userRole: options.role } as const;
      print(output(command), await authority.issue(identity, [], options.out ?? ''), issuedText);
    });

  certs
    .command('revoke <name>')
    .description('revoke all certificates of a name')
    .requiredOption('--dir <ca_dir>', 'folder of the certificate authority')
    .option('--out <dir>', 'also copy the new revocation list into this host folder; may be repeated', collect)
    .action(async (name: string, options: { dir: string; out?: string[] }, command: Command) => {
      const { Authority } = await import('../tls/authority.js');
      const authority = await Authority.open(options.dir);
      const revoked = await authority.revoke(name);
      for (const out of options.out ?? []) await authority.copyRevocations(out);
      const done = options.out === undefined ? '' : ' (done for the folders given with --out)';
      print(output(command), revoked, () => {
        const next = `copy ${join(options.dir, 'crl.pem')} into the TLS folder of every host${done}`;
        return `revoked ${revoked.length} certificate(s) of ${name}; ${next}\n`;
      });
    });

  certs
    .command('show')
    .description('list the certificates that an authority has issued, or show that of a host')
    .requiredOption('--dir <dir>', 'folder of the certificate authority or of the host')
    .action(async (options: CertsOptions, command: Command) => {
      print(output(command), await show(options.dir ?? ''), (issued) =>
        table(
          ['NAME', 'ROLE', 'SERIAL', 'VALID UNTIL', 'STATE', 'ADDRESSES'],
          issued.map((entry) => [
            `${entry.role}/${entry.name}`,
            entry.userRole ?? (entry.role === 'host' ? '' : 'viewer'),
            entry.serial,
            entry.expiresAt,
            entry.revokedAt !== null ? 'revoked' : Date.parse(entry.expiresAt) < Date.now() ? 'expired' : 'valid',
            entry.addresses.join(' '),
          ]),
        ),
      );
    });
}

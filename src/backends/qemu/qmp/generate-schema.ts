/**
 * Prints src/backends/qemu/qmp/schema.ts: the types of the arguments and answers of the QMP commands that this project
 * uses. They come from the schema of a running QEMU (query-qmp-schema). Only this list is written by hand.
 *
 * QEMU's schema has no type names (they are numbers), so types are written in place. A member whose type contains
 * itself becomes `unknown`.
 */
export const QMP_COMMANDS_USED = [
  'announce-self',
  'cont',
  'device_add',
  'device_del',
  'human-monitor-command',
  'migrate',
  'migrate-continue',
  'migrate-incoming',
  'migrate-pause',
  'migrate-recover',
  'migrate-set-capabilities',
  'migrate-set-parameters',
  'migrate-start-postcopy',
  'migrate_cancel',
  'qmp_capabilities',
  'qom-get',
  'qom-list',
  'query-chardev',
  'query-cpus-fast',
  'query-kvm',
  'query-machines',
  'query-memdev',
  'query-migrate',
  'query-migrate-capabilities',
  'query-migrate-parameters',
  'query-qmp-schema',
  'query-status',
  'query-uuid',
  'query-version',
  'quit',
  'ringbuf-read',
  'set_link',
  'stop',
  'system_powerdown',
  'system_reset',
] as const;

interface SchemaMember {
  readonly name: string;
  readonly type: string;
  readonly default?: unknown;
}

export interface SchemaEntry {
  readonly name: string;
  readonly 'meta-type': string;
  readonly 'arg-type'?: string;
  readonly 'ret-type'?: string;
  readonly 'allow-oob'?: boolean;
  readonly 'json-type'?: string;
  readonly 'element-type'?: string;
  readonly members?: readonly { readonly name?: string; readonly type?: string; readonly default?: unknown }[];
  readonly values?: readonly string[];
  readonly tag?: string;
  readonly variants?: readonly { readonly case: string; readonly type: string }[];
}

const JSON_TYPES: Readonly<Record<string, string>> = {
  string: 'string',
  int: 'number',
  number: 'number',
  boolean: 'boolean',
  null: 'null',
  value: 'unknown',
  object: 'Record<string, unknown>',
};

class TypeWriter {
  readonly #entries: ReadonlyMap<string, SchemaEntry>;

  constructor(schema: readonly SchemaEntry[]) {
    this.#entries = new Map(schema.map((entry) => [entry.name, entry]));
  }

  entry(name: string): SchemaEntry {
    const entry = this.#entries.get(name);
    if (entry === undefined) throw new Error(`QEMU's schema does not know ${name}`);
    return entry;
  }

  /** `open` has the types that enclose this one, so that a type that contains itself is detected. */
  type(name: string, open: readonly string[] = []): string {
    if (open.includes(name)) return 'unknown';
    const entry = this.entry(name);
    const inside = [...open, name];
    switch (entry['meta-type']) {
      case 'builtin':
        return JSON_TYPES[entry['json-type'] ?? ''] ?? 'unknown';
      case 'enum':
        return (entry.values ?? []).map((value) => `'${value}'`).join(' | ');
      case 'array':
        return `readonly (${this.type(entry['element-type'] ?? '', inside)})[]`;
      case 'alternate':
        return (entry.members ?? []).map((member) => this.type(member.type ?? '', inside)).join(' | ');
      case 'object':
        return this.#object(entry, inside);
      default:
        return 'unknown';
    }
  }

  #object(entry: SchemaEntry, inside: readonly string[]): string {
    const members = (entry.members ?? []) as readonly SchemaMember[];
    const own = members.filter((member) => member.name !== entry.tag).map((member) => this.#member(member, inside));
    if (entry.tag === undefined) return own.length === 0 ? 'Record<string, never>' : `{ ${own.join('; ')} }`;
    const tag = entry.tag;
    const variants = entry.variants ?? [];
    const isBare = (variant: { readonly type: string }) => (this.entry(variant.type).members ?? []).length === 0;
    const bare = variants.filter(isBare).map((variant) => `'${variant.case}'`);
    const union = variants
      .filter((variant) => !isBare(variant))
      .map((variant) => `({ readonly '${tag}': '${variant.case}' } & ${this.type(variant.type, inside)})`);
    if (bare.length > 0) union.push(`{ readonly '${tag}': ${bare.join(' | ')} }`);
    return `({ ${own.join('; ')} } & (${union.join(' | ')}))`;
  }

  #member(member: SchemaMember, inside: readonly string[]): string {
    return `readonly '${member.name}'${'default' in member ? '?' : ''}: ${this.type(member.type, inside)}`;
  }
}

/** Returns the text of schema.ts, not yet formatted. Throws if QEMU lacks one of the commands. */
export function commandTypes(schema: readonly SchemaEntry[]): string {
  const writer = new TypeWriter(schema);
  const commands = QMP_COMMANDS_USED.map((name) => {
    const entry = writer.entry(name);
    const oob = entry['allow-oob'] === true ? 'true' : 'false';
    const [argumentType, returnType] = [entry['arg-type'], entry['ret-type']].map((type) => writer.type(type ?? ''));
    return [
      `'${name}': { readonly arguments: ${argumentType};`,
      `readonly returns: ${returnType};`,
      `readonly isOutOfBandAllowed: ${oob} };`,
    ].join(' ');
  });
  return `/** Generated by scripts/generate-qmp-types from query-qmp-schema of QEMU 7.2. Do not edit. */
export interface QmpCommands {
${commands.join('\n')}
}
`;
}

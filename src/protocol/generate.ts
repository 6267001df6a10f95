/**
 * Generates native/wire/wire_generated.hpp (C++) and native/preload/wire_generated.h (C) from wire.ts and datagrams.ts.
 * `npm run generate` writes the files; `npm run generate -- --check` fails if a file on disk differs.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import * as datagrams from './datagrams.js';
import * as wire from './wire.js';

const FIELD_BYTES: Record<string, number> = { u8: 1, u16: 2, u32: 4, u64: 8 };
const C_TYPES: Record<string, string> = { u8: 'uint8_t', u16: 'uint16_t', u32: 'uint32_t', u64: 'uint64_t' };

function fieldBytes(type: string): number {
  return FIELD_BYTES[type] ?? Number(type.slice('bytes'.length));
}

function fieldDeclaration(name: string, type: string): string {
  const scalar = C_TYPES[type];
  return scalar ? `${scalar} ${name};` : `uint8_t ${name}[${fieldBytes(type)}];`;
}

function pascal(name: string): string {
  return name
    .toLowerCase()
    .split('_')
    .map((word) => word.charAt(0).toUpperCase() + word.slice(1))
    .join('');
}

function snake(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

const ENUMS: Record<string, { values: Record<string, number>; type: string }> = {
  Channel: { values: wire.CHANNEL, type: 'uint16_t' },
  HelloStatus: { values: wire.HELLO_STATUS, type: 'uint16_t' },
  FrameOp: { values: wire.FRAME_OP, type: 'uint8_t' },
  OpStatus: { values: wire.OP_STATUS, type: 'uint8_t' },
  DatagramKind: { values: datagrams.DATAGRAM_KIND, type: 'uint8_t' },
  Security: { values: wire.SECURITY, type: 'uint8_t' },
  PageState: { values: wire.PAGE_STATE, type: 'uint8_t' },
  PreloadOp: { values: wire.PRELOAD_OP, type: 'uint16_t' },
  PreloadStatus: { values: wire.PRELOAD_STATUS, type: 'uint16_t' },
  PreloadDescriptor: { values: wire.PRELOAD_DESCRIPTOR, type: 'uint8_t' },
  NativeError: { values: wire.NATIVE_ERROR, type: 'uint32_t' },
  InjectPoint: { values: wire.INJECT_POINT, type: 'uint32_t' },
};

function structLines(definition: wire.StructDefinition, isC: boolean): string[] {
  const bytes = definition.fields.reduce((sum, [, type]) => sum + fieldBytes(type), 0);
  if (bytes !== definition.bytes)
    throw new Error(`${definition.name}: fields take ${bytes} bytes, not ${definition.bytes}`);
  const name = isC ? `struct vmg_${snake(definition.name).slice(1)}` : `struct ${definition.name}`;
  const check = isC ? '_Static_assert' : 'static_assert';
  return [
    `/* ${definition.comment} */`,
    isC ? `${name} {` : `${name} {`,
    ...definition.fields.map(
      ([field, type, comment]) => `  ${fieldDeclaration(field, type)}${comment ? ` /* ${comment} */` : ''}`,
    ),
    isC ? '} __attribute__((packed));' : '} __attribute__((packed));',
    `${check}(sizeof(${name}) == ${definition.bytes}, "wire layout");`,
    '',
  ];
}

const HEAD = '/* Generated from src/protocol/wire.ts by `npm run generate`; do not edit. */';

export function cppHeader(): string {
  const lines = [
    HEAD,
    '// clang-format off',
    '#pragma once',
    '#include <array>',
    '#include <cstddef>',
    '#include <cstdint>',
    '',
    'namespace vmigrate::wire {',
    '',
  ];
  lines.push(`inline constexpr uint16_t kProtocolVersion = ${wire.PROTOCOL_VERSION};`);
  lines.push(`inline constexpr uint16_t kOldHelloVersion = ${wire.OLD_HELLO_VERSION};`);
  for (const [name, value] of Object.entries({ ...wire.CONSTANTS, ...datagrams.DATAGRAM_CONSTANTS }))
    lines.push(`inline constexpr uint32_t k${pascal(name)} = ${value}u;`);
  lines.push('');
  for (const [name, { values, type }] of Object.entries(ENUMS)) {
    lines.push(`enum class ${name} : ${type} {`);
    for (const [key, value] of Object.entries(values)) lines.push(`  k${pascal(key)} = ${value},`);
    lines.push('};', '');
  }
  for (const [name, counters] of [
    ['TargetCounter', wire.TARGET_COUNTERS],
    ['SourceCounter', wire.SOURCE_COUNTERS],
    ['ImageCounter', wire.IMAGE_COUNTERS],
  ] as const) {
    lines.push(`enum class ${name} : size_t {`);
    counters.forEach((counter, index) =>
      lines.push(`  k${counter.charAt(0).toUpperCase()}${counter.slice(1)} = ${index},`),
    );
    lines.push('};', `inline constexpr size_t k${name}Count = ${counters.length};`, '');
  }
  for (const definition of [...wire.STRUCTS, ...datagrams.DATAGRAM_STRUCTS])
    lines.push(...structLines(definition, false));
  lines.push('}  // namespace vmigrate::wire', '');
  return lines.join('\n');
}

export function cHeader(): string {
  const lines = [
    HEAD,
    '/* clang-format off */',
    '#ifndef VMG_WIRE_GENERATED_H',
    '#define VMG_WIRE_GENERATED_H',
    '#include <stdint.h>',
    '',
  ];
  for (const [name, value] of Object.entries(wire.CONSTANTS)) {
    if (name.startsWith('PRELOAD_')) lines.push(`#define VMG_${name} ${value}u`);
  }
  for (const [prefix, values] of [
    ['PRELOAD_OP', wire.PRELOAD_OP],
    ['PRELOAD_STATUS', wire.PRELOAD_STATUS],
    ['PRELOAD_DESCRIPTOR', wire.PRELOAD_DESCRIPTOR],
  ] as const) {
    for (const [key, value] of Object.entries(values)) lines.push(`#define VMG_${prefix}_${key} ${value}u`);
  }
  lines.push('');
  for (const definition of wire.STRUCTS.filter((struct) => struct.name.startsWith('Preload')))
    lines.push(...structLines(definition, true));
  lines.push('#endif', '');
  return lines.join('\n');
}

const OUTPUTS: readonly (readonly [string, () => string])[] = [
  ['native/wire/wire_generated.hpp', cppHeader],
  ['native/preload/wire_generated.h', cHeader],
];

function main(): void {
  const root = new URL('../..', import.meta.url);
  const isCheck = process.argv.includes('--check');
  for (const [path, render] of OUTPUTS) {
    const file = fileURLToPath(new URL(path, root));
    if (!isCheck) writeFileSync(file, render());
    else if (readFileSync(file, 'utf8') !== render()) {
      console.error(`${path} does not match src/protocol/wire.ts: run \`npm run generate\``);
      process.exitCode = 1;
    }
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) main();

/**
 * The OpenAPI 3.1 document, made from the routes themselves. Built when somebody asks for it: a second, never listening
 * instance of the server with the generator loaded, so that a daemon which is not asked does not carry it.
 */
import type { FastifyInstance } from 'fastify';

export async function openApiDocument(version: string, addRoutes: (app: FastifyInstance) => void): Promise<object> {
  const [{ fastify }, { default: swagger }, zodSchemas] = await Promise.all([
    import('fastify'),
    import('@fastify/swagger'),
    import('fastify-type-provider-zod'),
  ]);
  const zodToJsonConfig = { target: 'draft-2020-12', unrepresentable: 'any' } as const;
  const app = fastify();
  app.setValidatorCompiler(() => (value: unknown) => ({ value }));
  app.setSerializerCompiler(() => JSON.stringify);
  await app.register(swagger, {
    openapi: {
      openapi: '3.1.0',
      info: {
        title: 'vmigrate',
        version,
        description: 'Moves running virtual machines between hosts. Every failure answers an error with a stable code.',
      },
    },
    transform: zodSchemas.createJsonSchemaTransform({ zodToJsonConfig }),
    // Schemas with a name (the error's) stand there once, and the routes refer to them.
    transformObject: zodSchemas.createJsonSchemaTransformObject({ zodToJsonConfig }),
  });
  app.after(() => addRoutes(app));
  await app.ready();
  const document = app.swagger();
  await app.close();
  return document;
}

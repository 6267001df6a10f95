/**
 * The OpenAPI 3.1 document, generated from the routes. It is built on request, by a second instance of the server that
 * does not listen and has the generator loaded. So the generator takes no memory in a daemon that is not asked for it.
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
        description: 'Moves running virtual machines between hosts. Every failure returns an error with a stable code.',
      },
    },
    transform: zodSchemas.createJsonSchemaTransform({ zodToJsonConfig }),
    // A schema with a name (that of errors) appears once, and the routes refer to it.
    transformObject: zodSchemas.createJsonSchemaTransformObject({ zodToJsonConfig }),
  });
  app.after(() => addRoutes(app));
  await app.ready();
  const document = app.swagger();
  await app.close();
  return document;
}

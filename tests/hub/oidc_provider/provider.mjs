// An OpenID Connect provider for tests: npm's oidc-provider, with its own forms for signing in and consenting.
//
//   node provider.mjs '{"clientId": …, "clientSecret": …, "redirectUris": […], "accounts": {login: claims}, "port": 0}'
//
// It prints one line of JSON, {"issuer": …}, once it listens on loopback, and ends with its standard input.
import { generateKeyPairSync } from 'node:crypto';
import { createServer } from 'node:http';

import { Provider } from 'oidc-provider';

const wanted = JSON.parse(process.argv[2]);
const server = createServer();
await new Promise((resolve) => server.listen(wanted.port ?? 0, '127.0.0.1', resolve));
const issuer = `http://127.0.0.1:${server.address().port}`;

// New keys at each start, as after a rotation.
const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });

const provider = new Provider(issuer, {
  clients: [{
    client_id: wanted.clientId,
    ...(wanted.clientSecret ? { client_secret: wanted.clientSecret } : { token_endpoint_auth_method: 'none' }),
    redirect_uris: wanted.redirectUris,
    grant_types: ['authorization_code'],
    response_types: ['code'],
  }],
  pkce: { required: () => true, methods: ['S256'] },
  // Where claims are: in the ID token (as of Google), or at the userinfo endpoint alone (as the standard has it).
  conformIdTokenClaims: !wanted.claimsInIdToken,
  claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name'] },
  findAccount: (ctx, login) => {
    const claims = wanted.accounts[login];
    return claims && { accountId: login, claims: () => ({ sub: login, ...claims }) };
  },
  jwks: { keys: [{ ...privateKey.export({ format: 'jwk' }), use: 'sig', alg: 'RS256' }] },
  cookies: { keys: ['of tests'] },
});
server.on('request', provider.callback());
process.stdout.write(`${JSON.stringify({ issuer })}\n`);
process.stdin.on('end', () => process.exit(0)).resume();

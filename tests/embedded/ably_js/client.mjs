// Ably's own SDK at a broker, driven by lines of JSON on its standard input; it answers by lines of JSON.
//
//   node client.mjs '{"endpoint": "127.0.0.1", "port": 9000, "token": …, "clientId": …, "binary": true}'
//
// {"do": "subscribe" | "publish" | "close", "band": …, "data": base64} → {"did": …} or {"failed": code, "why": …};
// what arrives: {"band": …, "data": base64, "clientId": …}. It ends with its standard input.
import { createInterface } from 'node:readline';

import Ably from 'ably';

const wanted = JSON.parse(process.argv[2]);
const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

const client = new Ably.Realtime({
  authCallback: (_params, done) => done(null, wanted.token),
  clientId: wanted.clientId,
  endpoint: wanted.endpoint,
  port: wanted.port,
  tls: false,
  useBinaryProtocol: wanted.binary,
  logLevel: 0,
});

// A string arrives as one, bytes as a buffer.
const bytes = (data) => Buffer.from(data).toString('base64');

const acts = {
  subscribe: ({ band }) => client.channels.get(band).subscribe(
    (message) => say({ band, data: bytes(message.data), clientId: message.clientId ?? '', id: message.id })),
  publish: ({ band, data, text, id }) => client.channels.get(band).publish(
    { name: 'm', data: text ?? Buffer.from(data, 'base64'), ...(id ? { id } : {}) }),
  connection: () => client.connection.once('connected').then(() => undefined),
};

say({ did: 'start' });
for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  try {
    if (asked.do !== 'connection' || client.connection.state !== 'connected') await acts[asked.do](asked);
    say({ did: asked.do });
  } catch (error) {
    say({ failed: error.code ?? 0, why: String(error.message) });
  }
}
client.close();
process.exit(0);

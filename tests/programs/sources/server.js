// A small HTTP server that goes on allocating and collecting, and looks whether new buffers are zero and old ones as they were.
// usage: node server.js PORT
const http = require('http');
const crypto = require('crypto');

const expand = (i) => crypto.createHash('sha256').update(String(i)).digest('hex').repeat(1 + (i * 37) % 200);
const held = new Map();
for (let i = 0; i < 4000; i++) held.set(i, expand(i));
let next = 4000;

function check(rounds) {
  let wrong = 0;
  const kept = [];
  for (let i = 0; i < rounds; i++) {
    const buffer = Buffer.alloc(1024 + Math.floor(Math.random() * 300000));
    for (let at = 0; at < buffer.length; at += 509) if (buffer[at] !== 0) { wrong++; break; }
    buffer.fill(0xa5);
    kept[i % 50] = buffer;
    if (kept[(i * 7) % 50]?.[17] === 0) wrong++;
  }
  for (const [i, text] of held) if (text !== expand(i)) wrong++;
  for (let i = 0; i < 100; i++) { held.delete(next - 4000); held.set(next, expand(next)); next++; }
  return { wrong, held: held.size };
}

http.createServer((request, response) => {
  const url = new URL(request.url, 'http://localhost');
  response.end(JSON.stringify(url.pathname === '/check' ? check(Number(url.searchParams.get('rounds'))) : { ok: true }));
}).listen(Number(process.argv[2]), '127.0.0.1');

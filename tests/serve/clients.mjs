// openai-node, the AI SDK and the Agents SDK, unmodified, against a server: `node clients.mjs HOST:PORT`.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { connect } from "node:net";
import { createServer } from "node:tls";
import assert from "node:assert";
import OpenAI from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";
import { streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession, tool } from "@openai/agents/realtime";
import { z } from "zod";

const place = process.argv[2];
const messages = [
  { role: "system", content: "be kind" },
  { role: "user", content: "hello there" },
  { role: "assistant", content: "good day" },
  { role: "user", content: "what is it" },
];

async function completions() {
  const client = new OpenAI({ baseURL: `http://${place}/v1`, apiKey: "none" });
  const asked = { model: "tiny", messages, temperature: 0, max_tokens: 20 };
  const whole = await client.chat.completions.create(asked);
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    streamed += chunk.choices[0]?.delta.content ?? "";
  assert(streamed);
  assert.equal(streamed.trim(), whole.choices[0].message.content);

  const provider = createOpenAICompatible({ name: "tiny", baseURL: `http://${place}/v1` });
  const answer = streamText({ model: provider("tiny"), messages, temperature: 0, maxOutputTokens: 20 });
  let text = "";
  for await (const part of answer.textStream) text += part;
  assert.equal(text.trim(), streamed.trim());
}

// This client speaks TLS alone.
async function realtime() {
  execFileSync("openssl", ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
    "-days", "1", "-subj", "/CN=localhost"], { stdio: "ignore" });
  const [host, port] = place.split(":");
  const proxy = createServer({ key: readFileSync("key.pem"), cert: readFileSync("cert.pem") }, (socket) => {
    const inner = connect(Number(port), host);
    for (const end of [socket, inner]) end.on("error", () => {});
    socket.pipe(inner).pipe(socket);
  });
  await new Promise((done) => proxy.listen(0, "localhost", done));
  const client = new OpenAI({ baseURL: `https://localhost:${proxy.address().port}/v1`, apiKey: "none" });
  const ws = new OpenAIRealtimeWS({ model: "tiny", options: { rejectUnauthorized: false } }, client);
  const errors = [];
  ws.on("error", (error) => errors.push(error));
  const next = (kind) => new Promise((done) => ws.once(kind, done));
  const updated = next("session.updated");
  ws.socket.on("open", () => ws.send({ type: "session.update", session: { type: "realtime", output_modalities: ["text"] } }));
  await updated;
  const done = next("response.done");
  ws.send({ type: "conversation.item.create",
    item: { type: "message", role: "user", content: [{ type: "input_text", text: "hello there" }] } });
  ws.send({ type: "response.create" });
  assert((await done).response.output[0].content[0].text);
  assert.deepEqual(errors, []);
  ws.close();
  proxy.close();
}

async function agents() {
  const lookUp = tool({ name: "look_up", description: "Looks a word up.", parameters: z.object({ word: z.string() }),
    execute: async ({ word }) => word });
  const agent = new RealtimeAgent({ name: "kind", instructions: "be kind", tools: [lookUp] });
  const url = `ws://${place}/v1/realtime?model=tiny`;
  const transport = new OpenAIRealtimeWebSocket({ url, useInsecureApiKey: true });
  const session = new RealtimeSession(agent, { transport, model: "tiny", config: { outputModalities: ["text"] } });
  const errors = [];
  session.on("error", (error) => errors.push(error));
  const next = (kind) => new Promise((done) => {
    const seen = (event) => {
      if (event.type !== kind) return;
      session.off("transport_event", seen);
      done(event);
    };
    session.on("transport_event", seen);
  });
  await session.connect({ apiKey: "none", url });
  for (const text of ["hello there", "what is it"]) {
    const begun = next("response.output_text.delta"), done = next("response.done");
    session.sendMessage(text);
    await begun;
    session.interrupt();
    assert(["cancelled", "completed"].includes((await done).response.status));
  }
  const said = session.history.filter((item) => item.role === "user").map((item) => item.content[0].text);
  assert.deepEqual(said, ["hello there", "what is it"]);
  assert.deepEqual(errors, []);
  session.close();
}

for (const part of [completions, realtime, agents]) {
  await part();
  console.log(part.name);
}
process.exit(0);

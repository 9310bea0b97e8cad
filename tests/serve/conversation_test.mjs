// The page's view of a conversation, run by node: what was heard, where a barge-in falls, sentences, latency.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Conversation, heardOf, pairsOf, sentences } from "../../duplex_jax/assets/page/conversation.js";

// Pairs of [user, assistant], one every two seconds.
function talk(pairs, audio = false) {
  const conversation = new Conversation(2, audio);
  pairs.forEach(([user, assistant], slice) => conversation.add({ slice, user, assistant }, 2 * (slice + 1)));
  return conversation;
}
const text = (sentence) => sentence.parts.map((p) => (p.kind ? `[${p.text}]` : p.text)).join("");
const said = (conversation) => sentences(conversation.slices).map((s) => `${s.who}: ${text(s).trim()}`);

test("what was not heard is struck out, in this slice and in all later ones", () => {
  const conversation = talk([["Tell me", "Paris is the"], [null, " capital of"], [null, " France."]], true);
  conversation.heard(1, 8);
  assert.deepEqual(conversation.slices.map(heardOf), [["Paris is the", ""], [" capital", " of"], ["", " France."]]);
  assert.deepEqual(said(conversation), ["you: Tell me", "it: Paris is the capital[ of France.]"]);
  conversation.heard(0, 5); // less was heard than was thought
  assert.deepEqual(heardOf(conversation.slices[1]), ["", " capital of"]);
  conversation.heard(null, null); // nothing that the server knows of
  assert.deepEqual(heardOf(conversation.slices[0]), ["Paris", " is the"]);
});

test("a barge-in marks the slice in whose interval the user spoke, however late slices come", () => {
  const conversation = talk([["Tell me", "Paris is"]], true);
  conversation.stop(4.5, 4.6); // after the tick of slice 1, before its words come
  conversation.add({ slice: 1, user: null, assistant: " the capital", late: 1 }, 5);
  assert.equal(conversation.bargeIns[0].index, undefined);
  conversation.add({ slice: 2, user: "Stop", assistant: null, late: 0.5 }, 6.5);
  assert.equal(conversation.bargeIns[0].index, 2);
  assert.ok(Math.abs(conversation.bargeIns[0].seconds - 0.1) < 1e-9);
});

test("without sound, words that silence the assistant are a barge-in, and words that do not are none", () => {
  const conversation = talk([["Tell me", "Paris is"], ["mhm", " the capital"], [null, " of France"]]);
  assert.deepEqual(conversation.bargeIns, []);
  conversation.type("Stop please", 7);
  conversation.add({ slice: 3, user: "Stop please", assistant: null }, 8);
  assert.deepEqual(conversation.bargeIns, [{ at: 7, seconds: 1, index: 3 }]);
});

test("slices are joined into sentences, and none begins with a comma or a full stop", () => {
  const conversation = talk([
    ["Tell me about", null],
    ["Paris.", "It has the Eiffel Tower"],
    [null, ", Notre Dame"],
    [null, null],
    [null, ". It's old. In 3.5 km"],
    ["mhm", " there is more."],
    [null, null],
    ["And?", null],
  ]);
  assert.deepEqual(said(conversation), [
    "you: Tell me about Paris.",
    "it: It has the Eiffel Tower, Notre Dame.",
    "it: It's old.",
    "it: In 3.5 km there is more.",
    "you: mhm",
    "you: And?",
  ]);
});

test("spoken words are shown from where the microphone grew loud", () => {
  const conversation = new Conversation(2, true);
  for (const [at, level] of [[0.5, 0.001], [1.2, 0.1], [1.3, 0.1]]) conversation.hear(at, level);
  assert.equal(conversation.add({ slice: 0, user: "Hello", assistant: null }, 2).start, 1.2);
});

test("words wait until a slice takes them", () => {
  const conversation = new Conversation(2);
  conversation.type("one two three", 0.5);
  conversation.type("one", 0.6);
  conversation.add({ slice: 0, user: "one two", assistant: null }, 2);
  assert.deepEqual(conversation.waiting.map((w) => w.word), ["three", "one"]);
  conversation.add({ slice: 1, user: "three one", assistant: "Four." }, 4);
  assert.deepEqual(conversation.waiting, []);
});

test("latency runs from the user's last word to the first sound, and is told as the median", () => {
  const conversation = new Conversation(2, true);
  for (const [asked, answered] of [[1, 2], [10, 15], [20, 22]]) {
    conversation.lastWord = asked;
    conversation.add({ slice: conversation.slices.length, user: null, assistant: "Yes." }, answered - 0.5);
    conversation.sound(conversation.slices.length - 1, answered, [0.1], 0.064);
    conversation.sound(conversation.slices.length - 1, answered + 1, [0.1], 0.064); // goes on: no answer of its own
  }
  assert.deepEqual(conversation.latencies, [1, 5, 2]);
  assert.equal(conversation.latency, 2);
  assert.equal(new Conversation().latency, null);
});

test("the server's timeline fills what never came and strikes out what it no longer holds", () => {
  const conversation = talk([["Hello", "Hi there"]]);
  conversation.reconcile([["Hello", "Hi"], [null, "How are"], ["Well", null]], 0, 10);
  assert.deepEqual(heardOf(conversation.slices[0]), ["Hi", " there"]);
  assert.deepEqual(conversation.slices.map((s) => [s.user, s.assistant]), [["Hello", "Hi there"], [null, "How are"], ["Well", null]]);
});

test("files of timelines: silence, words that look like it, and what is none", () => {
  const output = ["Hi", "<idle>", "a <\\idle> b", " c"].map((content, i) => ({ role: i % 2 ? "assistant" : "user", content }));
  assert.deepEqual(pairsOf({ output }), [["Hi", null], ["a <idle> b", " c"]]);
  assert.throws(() => pairsOf({ output: output.slice(1) }), /pairs/);
  assert.throws(() => pairsOf(null), /pairs/);
});

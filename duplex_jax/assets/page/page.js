// The page of the server: wires the connection, the conversation, sound, lanes, transcript, dock and drawer together.

import { Microphone, Player, STEP } from "./audio.js";
import { Connection } from "./connection.js";
import { Conversation, LOUD, pairsOf } from "./conversation.js";
import { Dock } from "./dock.js";
import { Drawer, save } from "./drawer.js";
import { Lanes } from "./lanes.js";
import SAMPLE from "./sample.js";
import { stateOf } from "./state.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const seconds = () => performance.now() / 1000;

let conversation = Object.assign(new Conversation(), SAMPLE);
let began = null; // when the server began it, in `seconds()`
let started = null; // what the server said of the session
let outcome = "ready"; // where no session is: ready, ended, failed, replaying
let player = null;
let soundFrom = 0; // when the assistant last began to be heard
let deaf = false; // sound that was under way when the user interrupted is not played
let saved = null; // the server's timeline of the last conversation
let saving = false;
let unsent = []; // words that wait for the connection
let plan = []; // what a prompt says once the assistant speaks
const QUIET = { active: false, onset: 0, last: 0, loud: 0, pieces: 0, sum: 0 };
let speech = { ...QUIET };
let spokenTo = false; // whether the last conversation began with the microphone
let replaying = null;

const now = () => (began === null ? 0 : seconds() - began);
const lanes = new Lanes($("lanes"));
const transcript = new Transcript();
lanes.show(conversation, () => SAMPLE.now);

// What the server can do, before anybody connects.
const health = fetch("/healthz").then((r) => r.json()).catch(() => ({}));
health.then(({ model, audio }) => {
  $("model").textContent = model ?? "";
  $("headphones").hidden = audio === false;
  $("silent").hidden = audio !== false;
  dock.speech(audio !== false);
});

const microphone = new Microphone({
  heard: hearPiece,
  lost: () => (problem("The microphone was disconnected or taken away.", "Retry", () => listen()), refresh()),
});

const connection = new Connection({ state: onState, message: (m) => handlers[m.type]?.(m), failed: onFailed });

const drawer = new Drawer({
  volume: (v) => player && (player.gain.gain.value = v),
  microphone: () => microphone.on && listen(),
  speaker: (id) => player?.context.setSinkId?.(id).catch(() => problem("This loudspeaker cannot be used.")),
  replay,
  problem: (text) => problem(text),
  download,
});

const dock = new Dock({
  talk: async () => {
    if (connection.state === "off") start((await health).audio !== false);
    else if (microphone.on) (microphone.close(), refresh());
    else if ((await health).audio) listen();
  },
  words: (text) => {
    if (connection.state === "off") start(false, text);
    else sendWords(text);
  },
  interrupt: () => interrupt(now()),
  end: () => (replaying ? stopReplay() : (microphone.close(), connection.end())),
});

// Beginning and ending.

async function start(withMicrophone, words = "") {
  if (connection.state !== "off" || start.busy) return;
  start.busy = true;
  stopReplay();
  dock.solve();
  player ??= new Player(drawer.volume);
  player.reset();
  player.context.resume();
  if (drawer.get("speaker")) player.context.setSinkId?.(drawer.get("speaker")).catch(() => {});
  const { audio = false } = await health;
  start.busy = false;
  began = null;
  [started, deaf, saved, spokenTo] = [null, false, null, withMicrophone];
  [unsent, plan] = [[], []];
  fresh(new Conversation(Number(drawer.get("slice_seconds")) || 2, audio));
  connection.start({ ...drawer.settings, audio }, drawer.key);
  if (words) sendWords(words);
  if (withMicrophone && audio) listen();
}

function fresh(next) {
  conversation = next;
  speech = { ...QUIET };
  $("welcome").hidden = $("caption").hidden = true;
  $("transcript").hidden = false;
  transcript.clear();
  lanes.show(conversation, now);
  lanes.run(true);
}

async function listen() {
  try {
    const opening = microphone.open(drawer.get("microphone"));
    refresh();
    await opening;
  } catch (error) {
    problem(error.message, error.name === "NotAllowedError" ? "Allow microphone" : "Retry", () => listen());
  }
  refresh();
}

function onState(state) {
  if (state === "off") {
    microphone.close();
    player?.reset();
    lanes.run(false);
    if (outcome !== "failed") outcome = "ended";
    lanes.show(conversation, ((at) => () => at)(now()));
  } else outcome = "live";
  if (state === "reconnecting") player?.stop();
  if (state === "silent") problem("The server is not answering.", "Reconnect", () => connection.redial());
  else if (state !== "off" && dock.shows("silent")) dock.solve();
  refresh();
}

function onFailed(reason, message) {
  outcome = "failed";
  const again = () => start(spokenTo, unsent.join(" "));
  if (reason === "key") problem(message, "Enter key", () => drawer.open("key"));
  else problem(reason === "not_found" ? "The server no longer has this conversation." : message, reason === "not_found" ? "Start anew" : "Retry", again);
  refresh();
}

function problem(text, action, act) {
  dock.problem(text, action, act, connection.state);
}

// The user.

const audible = () => player?.playing ?? false;

// Sound stops at once, and the server is told what was heard of it. `at`: when the user began to speak.
function interrupt(at) {
  if (audible()) {
    deaf = true;
    connection.send({ type: "played", samples: player.stop() });
    conversation.stop(Math.min(now(), Math.max(at, soundFrom)), now());
  } else if (conversation.speaking(now())) {
    connection.send({ type: "cancel" });
    conversation.stop(at, now());
  }
}

function sendWords(words) {
  if (audible()) interrupt(now());
  conversation.type(words, now());
  if (connection.open) connection.send({ type: "text", text: words });
  else unsent.push(words);
}

function hearPiece(pcm, level) {
  const at = now();
  dock.level(level);
  if (!connection.open) return;
  speech.sum += level;
  if (++speech.pieces % 2 === 0) {
    conversation.hear(at - STEP, speech.sum / 2);
    speech.sum = 0;
  }
  if (level > LOUD) {
    if (speech.loud++ === 0) speech.onset = at - STEP / 2;
    speech.last = at;
  } else speech.loud = 0;
  // Speech of the user while the assistant speaks: 96 ms of it stop the sound.
  if (speech.loud >= 3 && started?.mode === "duplex" && audible()) interrupt(speech.onset);
  connection.send(pcm);
}

// The server.

const handlers = {
  started(message) {
    const resumed = started?.session === message.session;
    started = message;
    drawer.started(message);
    conversation.k = message.slice_seconds;
    $("model").textContent = message.model + (message.mode === "duplex" ? "" : ", turn-based");
    if (resumed) {
      // What was under way when the connection was lost was not heard.
      if (message.audio && player) connection.send({ type: "played", samples: player.heard() });
      connection.send({ type: "timeline" });
    } else began = seconds();
    for (const words of unsent.splice(0)) connection.send({ type: "text", text: words });
  },
  slice(message) {
    const slice = conversation.add(message, now());
    transcript.update(conversation);
    const before = conversation.slices[slice.index - 1];
    if (plan.length && slice.assistant && (before?.assistant || started.mode !== "duplex")) sendWords(plan.shift());
  },
  audio(message) {
    // What came too late to be heard is not in the context any more; the server counts its samples all the same.
    if (!player || deaf || conversation.slices[message.slice]?.heard != null) return deaf || player?.skip(message.pcm);
    const goesOn = audible();
    const { delay, levels } = player.play(message.pcm, message.rate);
    if (!goesOn) soundFrom = now() + delay;
    conversation.sound(message.slice, now() + delay, levels, STEP);
  },
  heard(message) {
    deaf = false;
    conversation.heard(message.slice, message.characters);
    transcript.update(conversation);
  },
  cancelled() {
    conversation.cancel();
    transcript.update(conversation);
  },
  speech_started() {
    speech.active = true;
    if (audible() && started.mode === "duplex") interrupt(now() - speech.last < 0.5 ? speech.onset : now());
  },
  speech_stopped() {
    speech.active = false;
    conversation.lastWord = speech.last || now();
  },
  timeline({ timeline, first = 0 }) {
    saved = timeline;
    if (saving) save("timeline.jsonl", `${JSON.stringify(timeline)}\n`);
    saving = false;
    if (!timeline) return;
    conversation.reconcile(pairsOf(timeline), first, now());
    transcript.update(conversation);
  },
  error: (message) => message.fatal || problem(message.message),
};

// Files.

// The server's own timeline: what was heard, and no more.
function download() {
  if (connection.open) {
    saving = true;
    connection.send({ type: "timeline" });
  } else if (saved) save("timeline.jsonl", `${JSON.stringify(saved)}\n`);
}

// Shows both sides of a file on the clock, without a server.
function replay(name, slices) {
  stopReplay();
  microphone.close();
  connection.end();
  const k = Number(drawer.get("slice_seconds")) || 2;
  setTimeout(() => {
    began = seconds();
    fresh(new Conversation(k));
    outcome = "replaying";
    dock.solve();
    let i = 0;
    const step = () => {
      if (i >= slices.length) return stopReplay();
      conversation.add({ slice: i, user: slices[i][0], assistant: slices[i++][1] }, now());
      transcript.update(conversation);
      refresh();
    };
    replaying = setInterval(step, k * 1000);
    refresh();
  }, connection.state === "off" ? 0 : 500);
}

function stopReplay() {
  if (!replaying) return;
  clearInterval(replaying);
  replaying = null;
  outcome = "ended";
  lanes.run(false);
  lanes.show(conversation, ((at) => () => at)(now()));
  refresh();
}

// What is shown of all this; nothing here moves the layout.

function refresh() {
  const at = now();
  const live = connection.open;
  const speaking = live && (audible() || (!conversation.audio && conversation.speaking(at)));
  const state = stateOf({ connection, outcome, conversation, speaking, hearing: speech.active || speech.loud > 2 || at - (dock.typed - (began ?? 0)) < 1, now: at });
  if (state.text !== $("state").textContent) $("state").textContent = state.text;
  $("state").dataset.state = state.name;
  const { latency } = conversation;
  $("latency").lastElementChild.textContent = latency === null || outcome === "ready" ? "–" : `${latency.toFixed(1)} s`;
  $("latency").classList.toggle("slow", latency > conversation.k);
  $("download").disabled = !(live || saved);
  $("later").hidden = connection.state === "off";
  dock.show({ state: connection.state, live, speaking, microphone: microphone.on, replaying: Boolean(replaying) });
}
setInterval(refresh, 100);

for (const button of $("prompts").children) {
  button.onclick = async () => {
    await start(false, button.dataset.say);
    if (button.dataset.then) plan.push(button.dataset.then);
  };
}
addEventListener("pagehide", () => microphone.close());

// For tests that drive the page.
window.duplex = {
  pairs: () => conversation.slices.map((s) => [s.user, s.assistant]),
  level: () => player?.level() ?? 0,
  playing: audible,
  conversation: () => conversation,
  now,
  connection,
};

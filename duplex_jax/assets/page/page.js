// The page of the server: one websocket, a microphone, a loudspeaker, and a line for every slice.

import { finishedWords, openSocket } from "/page/talk.js";

const $ = (id) => document.getElementById(id);
const LISTENING_RATE = 16000;

let socket = null;
let started = null; // what the server said of the session
let pairs = []; // [user, assistant] of every slice
let audio = null; // {context, gain, microphone, stream}
let player = null;

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function enable(on) {
  for (const id of ["text", "send", "stop", "download"]) $(id).disabled = !on;
  $("microphone").disabled = !(on && started?.audio);
  $("connect").textContent = on ? "End" : "Start";
  $("mode").disabled = on;
}

// The timeline.

function cell(text, kind) {
  const span = document.createElement("span");
  span.className = text === null ? "idle" : kind;
  span.textContent = text === null ? "·" : text;
  if (text === null) span.setAttribute("aria-label", "silent");
  return span;
}

function addSlice(slice) {
  const [user, assistant] = [slice.user, slice.assistant];
  const before = pairs.at(-1);
  pairs[slice.slice ?? pairs.length] = [user, assistant];
  if (user === null && assistant === null && before && before[0] === null && before[1] === null) {
    // A long silence is one line that counts.
    const last = $("timeline").lastElementChild;
    if (last?.dataset.silences) {
      last.dataset.silences = Number(last.dataset.silences) + 1;
      last.children[2].textContent = `· silent for ${last.dataset.silences} slices`;
      return;
    }
  }
  const row = document.createElement("div");
  row.className = "row";
  if (user !== null && before?.[1]) row.classList.add("barge");
  if (slice.late > (started?.slice_seconds ?? 2)) row.classList.add("late");
  const number = document.createElement("span");
  number.textContent = slice.slice ?? pairs.length - 1;
  const seconds = document.createElement("span");
  seconds.textContent = slice.late === undefined ? "" : slice.late.toFixed(2);
  row.append(number, cell(user, "you"), cell(assistant, "it"), seconds);
  if (user === null && assistant === null) row.dataset.silences = 1;
  if (row.classList.contains("barge")) row.title = "you spoke while the assistant was speaking";
  const box = $("timeline");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  box.append(row);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function clearTimeline() {
  pairs = [];
  for (const row of [...$("timeline").children].slice(1)) row.remove();
}

// Sound.

class Player {
  // Plays slices one behind the other and knows how many samples were heard.
  constructor(context, gain) {
    this.context = context;
    this.gain = gain;
    this.next = 0;
    this.sources = [];
    this.analyser = context.createAnalyser();
    gain.connect(this.analyser);
    this.reset();
  }

  reset() {
    this.given = 0; // samples given out so far, at the server's rate
    this.spans = []; // {start, first, length, rate} of what was given out
  }

  play(base64, rate) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const pcm = new Int16Array(bytes.buffer);
    const buffer = this.context.createBuffer(1, pcm.length, rate);
    buffer.copyToChannel(Float32Array.from(pcm, (s) => s / 32768), 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.gain);
    const start = Math.max(this.context.currentTime + 0.02, this.next);
    source.start(start);
    this.next = start + buffer.duration;
    this.sources.push(source);
    source.onended = () => (this.sources = this.sources.filter((s) => s !== source));
    this.spans.push({ start, first: this.given, length: pcm.length, rate });
    this.given += pcm.length;
  }

  get playing() {
    return this.next > this.context.currentTime;
  }

  // Samples that have been heard by now.
  heard() {
    const now = this.context.currentTime;
    let heard = this.spans[0]?.first ?? this.given;
    for (const { start, first, length, rate } of this.spans) {
      if (now > start) heard = first + Math.min(length, Math.round((now - start) * rate));
    }
    return heard;
  }

  // Silence at once; what was not heard is not counted. Gives the samples that were.
  stop() {
    const heard = this.heard();
    for (const source of this.sources) source.stop();
    this.sources = [];
    this.spans = [];
    this.next = 0;
    this.given = heard;
    return heard;
  }

  level() {
    const samples = new Float32Array(this.analyser.fftSize);
    this.analyser.getFloatTimeDomainData(samples);
    return Math.max(...samples.map(Math.abs));
  }
}

async function speakers() {
  if (player) return;
  const context = new AudioContext();
  const gain = context.createGain();
  gain.gain.value = Number($("volume").value);
  gain.connect(context.destination);
  audio = { context, gain };
  player = new Player(context, gain);
  await context.resume();
}

let deaf = false; // sound that was under way when the user interrupted is not played

// Whatever is being said stops at once, and the server is told what was heard of it.
function interrupt() {
  if (player?.playing) {
    deaf = true;
    send({ type: "played", samples: player.stop() });
  } else {
    send({ type: "cancel" });
  }
}

let loud = 0; // pieces in a row in which the microphone is loud

function heardPiece(piece) {
  let sum = 0;
  for (const s of piece) sum += s * s;
  const level = Math.sqrt(sum / piece.length);
  $("level").value = Math.min(1, level * 8);
  // Speech of the user while the assistant speaks: 96 ms of it stop the sound.
  loud = level > 0.02 ? loud + 1 : 0;
  if (loud === 3 && player?.playing && $("mode").value === "duplex") interrupt();
  if (socket?.readyState !== WebSocket.OPEN) return;
  const pcm = Int16Array.from(piece, (s) => Math.max(-1, Math.min(1, s)) * 32767);
  socket.send(pcm.buffer);
}

async function microphone(on) {
  if (!on) {
    audio?.stream?.getTracks().forEach((t) => t.stop());
    audio?.listening?.close();
    if (audio) audio.stream = audio.listening = undefined;
    $("microphone").setAttribute("aria-pressed", "false");
    $("level").value = 0;
    return;
  }
  if (!navigator.mediaDevices?.getUserMedia) {
    say("No microphone: browsers allow it on https pages and on localhost only. You can type.", true);
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
    });
    const listening = new AudioContext({ sampleRate: LISTENING_RATE });
    await listening.audioWorklet.addModule("/page/microphone.js");
    const node = new AudioWorkletNode(listening, "microphone");
    node.port.onmessage = (e) => heardPiece(e.data);
    listening.createMediaStreamSource(stream).connect(node);
    Object.assign(audio, { stream, listening });
    $("microphone").setAttribute("aria-pressed", "true");
    say("Listening. Speak at any moment.");
  } catch (error) {
    const reasons = {
      NotAllowedError: "The microphone is not allowed for this page; allow it in the browser, or type.",
      NotFoundError: "There is no microphone. You can type.",
      NotReadableError: "Another program has the microphone. You can type.",
    };
    say(reasons[error.name] ?? `The microphone cannot be used (${error.message}). You can type.`, true);
  }
}

// The server.

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

const handlers = {
  started(m) {
    started = m;
    $("model").textContent = `${m.model}, ${m.mode === "duplex" ? "duplex" : "turn-based"}`;
    say(m.audio ? "Connected. Type, or turn the microphone on." : "Connected. Type at any moment.");
    enable(true);
    $("text").focus();
  },
  waiting: (m) => say(`All places are taken; you are number ${m.place} in the queue.`),
  slice: addSlice,
  audio: (m) => deaf || player?.play(m.pcm, m.rate),
  heard: () => (deaf = false),
  speech_started: () => player?.playing && started.mode === "duplex" && interrupt(),
  error: (m) => say(m.message, true),
};

async function connect() {
  await speakers();
  say("Connecting.");
  socket = openSocket("/v1/duplex", $("key").value);
  socket.binaryType = "arraybuffer";
  let open = false;
  socket.onopen = async () => {
    open = true;
    const health = await fetch("/healthz").then((r) => r.json()).catch(() => ({}));
    send({ type: "start", version: 1, mode: $("mode").value, audio: Boolean(health.audio) });
  };
  socket.onmessage = (e) => {
    const message = JSON.parse(e.data);
    handlers[message.type]?.(message);
  };
  socket.onclose = (e) => {
    const bad = $("status").classList.contains("bad");
    if (!open) say("There is no server, or it asks for a key (below).", true);
    else if (!bad) say(e.code === 1000 ? "The conversation has ended." : `The connection was lost (${e.code}).`, e.code !== 1000);
    started = null;
    enable(false);
    microphone(false);
    player?.stop();
  };
}

function end() {
  send({ type: "end" });
  socket?.close(1000);
}

// The controls.

$("connect").onclick = () => (started ? end() : (clearTimeline(), player?.reset(), (deaf = false), connect()));
$("microphone").onclick = () => microphone($("microphone").getAttribute("aria-pressed") !== "true");
$("stop").onclick = interrupt;
$("volume").oninput = () => audio && (audio.gain.gain.value = Number($("volume").value));

// Finished words go out as they are typed; what is left goes out with Enter.
function sendWords(all) {
  if (!started) return;
  const words = finishedWords($("text"), all);
  if (!words) return;
  if (player?.playing) interrupt();
  send({ type: "text", text: words });
}
$("text").oninput = () => sendWords(false);
$("say").onsubmit = (e) => {
  e.preventDefault();
  sendWords(true);
};

const spell = (text) => (text === null ? "<idle>" : text.replace(/<(\\*)idle>/g, "<\\$1idle>"));
$("download").onclick = () => {
  const output = pairs.flatMap(([user, assistant]) => [
    { role: "user", content: spell(user) },
    { role: "assistant", content: spell(assistant) },
  ]);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ output }) + "\n"], { type: "application/jsonl" }));
  link.download = "timeline.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// A replay shows both sides of a file on the clock, without a server.
let replaying = null;
$("replay").onchange = async () => {
  const file = $("replay").files[0];
  if (!file) return;
  clearInterval(replaying);
  if (started) end();
  try {
    const { output } = JSON.parse((await file.text()).split("\n")[0]);
    if (!Array.isArray(output) || output.length % 2) throw new Error("no slice pairs");
    const read = (slice) => (slice.content === "<idle>" ? null : slice.content.replace(/<\\(\\*)idle>/g, "<$1idle>"));
    clearTimeline();
    let i = 0;
    say(`Replaying ${file.name}.`);
    const step = () => {
      if (2 * i >= output.length) {
        clearInterval(replaying);
        say(`${file.name}: ${output.length / 2} slices replayed.`);
        return;
      }
      addSlice({ slice: i, user: read(output[2 * i]), assistant: read(output[2 * i + 1]) });
      i += 1;
    };
    step();
    replaying = setInterval(step, 2000);
  } catch (error) {
    say(`${file.name} is no timeline (${error.message}); a line of JSON with "output".`, true);
  }
};

// For tests that drive the page: what was heard, and how loud the loudspeaker is.
window.duplex = { pairs: () => pairs, level: () => player?.level() ?? 0, playing: () => player?.playing ?? false };

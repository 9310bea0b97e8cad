// The study's page: consent, conversations, questionnaires. What comes next is the server's to say; nothing here knows
// more of the two models than their letters.

import { finishedWords, openSocket } from "/page/talk.js";

const $ = (id) => document.getElementById(id);

let about = null; // what the server says to everybody
let state = null; // where this participant is
let socket = null;
let key = "";

// The code stays with this tab, so that a page that is loaded again goes on; another tab asks for it.
const code = {
  get: () => sessionStorage.getItem("study-code") ?? "",
  set: (value) => (value ? sessionStorage.setItem("study-code", value) : sessionStorage.removeItem("study-code")),
};

function tell(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

async function ask(method, path, body) {
  const headers = { "Study-Code": code.get() };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Error("The server cannot be reached; try again in a moment.");
  }
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  return answer;
}

// Runs what a button asks for; what goes wrong is told in one line.
function guarded(work) {
  return async (event) => {
    event?.preventDefault();
    try {
      tell("");
      await work(event);
    } catch (error) {
      tell(error.message, true);
    }
  };
}

// Steps.

function show(next) {
  state = next;
  hangUp();
  const step = state?.step ?? "welcome";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== step;
  $("own").hidden = state === null;
  $("begin").hidden = $("return").hidden = about === null;
  $("mine").textContent = code.get();
  const enter = { talk: enterTalk, score: enterScore, review: enterReview, done: enterDone }[step];
  enter?.();
  document.querySelector(`#${step} h2`).focus();
}

async function load() {
  try {
    about ??= await ask("GET", "/api/about");
  } catch (error) {
    show(null); // with the field for a key
    throw error;
  }
  $("consent").replaceChildren(...about.consent.split(/\n\s*\n/).map((text) => make("p", { textContent: text })));
  $("note").replaceChildren(...about.note.map((text) => make("li", { textContent: text })));
  if (!code.get()) return show(null);
  try {
    show(await ask("GET", "/api/state"));
  } catch (error) {
    if (error.status === 404) code.set("");
    show(null);
    throw error;
  }
}

const refresh = async () => show(await ask("GET", "/api/state"));

$("begin").onsubmit = guarded(async () => {
  key ||= $("key").value.trim();
  const { code: mine, ...next } = await ask("POST", "/api/begin", { consent: $("agree").checked });
  code.set(mine);
  show(next);
  tell("Welcome. Write down your code, which is below.");
});

$("return").onsubmit = guarded(async () => {
  key ||= $("key").value.trim();
  code.set($("code").value.trim());
  await load();
});

$("key").onchange = guarded(async () => {
  key = $("key").value.trim();
  await load();
});

$("leave").onclick = () => {
  code.set("");
  $("code").value = "";
  $("agree").checked = false;
  show(null);
  tell("Until later. Type your code to go on.");
};

$("withdraw").onclick = () => $("sure").showModal();
$("sure").onclose = guarded(async () => {
  const sure = $("sure").returnValue === "yes";
  $("sure").returnValue = "no";
  if (!sure) return;
  await ask("POST", "/api/withdraw", {});
  $("leave").click();
  tell("Everything that you wrote and scored is deleted. Thank you all the same.");
});

// Conversations.

function enableTalk(on) {
  for (const id of ["text", "send", "end"]) $(id).disabled = !on;
  $("start").hidden = on;
}

function addWords(who, text) {
  const box = $("log");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  let line = box.lastElementChild;
  if (line?.className === who) {
    line.lastChild.textContent += who === "you" ? ` ${text}` : text;
  } else {
    line = make("p", { className: who }, make("b", { textContent: who === "you" ? "You: " : `Model ${state.model}: ` }));
    line.append(make("span", { textContent: text.trimStart() }));
    box.append(line);
  }
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function enterTalk() {
  document.querySelector("#talk h2").textContent = `Model ${state.model}, conversation ${state.session} of ${about.sessions}`;
  $("opening").textContent = state.opening;
  $("log").replaceChildren();
  $("text").value = "";
  enableTalk(false);
  $("start").textContent = state.live ? "Go on with the conversation" : "Begin the conversation";
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function hangUp() {
  if (socket) socket.onclose = socket.onmessage = null;
  socket?.close(1000);
  socket = null;
}

const handlers = {
  started(m) {
    $("log").replaceChildren();
    for (const [who, text] of m.log) addWords(who, text);
    enableTalk(true);
    tell("The conversation has begun. Type at any moment.");
    $("text").focus();
  },
  waiting: (m) => tell(`All places are taken; you are number ${m.place} in the queue.`),
  words: (m) => addWords("model", m.text),
  over() {
    $("text").disabled = $("send").disabled = true;
    tell("This conversation has reached its limit. End it, and go on.");
  },
  moved: () => tell("The conversation goes on in another window.", true),
  ended: () => guarded(refresh)(),
  error: (m) => tell(m.message, true),
};

$("start").onclick = () => {
  hangUp();
  tell("Connecting.");
  socket = openSocket("/api/talk", key);
  socket.onopen = () => send({ type: "start", code: code.get() });
  socket.onmessage = (e) => {
    const message = JSON.parse(e.data);
    handlers[message.type]?.(message);
  };
  socket.onclose = () => {
    socket = null;
    enableTalk(false);
    $("start").textContent = "Go on with the conversation";
    if (!$("status").classList.contains("bad")) tell("The connection was lost. Go on when you are ready.", true);
  };
};

function say(all) {
  const words = socket ? finishedWords($("text"), all) : "";
  if (!words) return;
  send({ type: "text", text: words });
  addWords("you", words);
}
$("text").oninput = () => say(false);
$("say").onsubmit = (e) => {
  e.preventDefault();
  say(true);
};
$("end").onclick = () => {
  say(true);
  send({ type: "end" });
};

// Questionnaires.

function sheet(letter, { given, fixed = false, button = "Save", then }) {
  const form = make("form", { className: "sheet" });
  form.dataset.model = letter;
  form.append(make("h3", { textContent: `Model ${letter}` }));
  const points = [];
  for (let n = about.low; n <= about.high; n++) points.push(n);
  for (const [name, question] of Object.entries(about.aspects)) {
    const group = make("div", { className: "points" });
    for (const n of points) {
      const input = make("input", { type: "radio", name, value: n, required: true, disabled: fixed });
      input.checked = given?.scores[name] === n;
      group.append(make("label", {}, input, String(n)));
    }
    const hint = Object.entries(about.scale).map(([n, words]) => `${n}: ${words}`).join(", ");
    form.append(make("fieldset", {}, make("legend", { textContent: question }), group,
      make("p", { className: "hint", textContent: hint })));
  }
  const comment = make("textarea", {
    name: "comment", rows: 3, maxLength: about.most_comment, value: given?.comment ?? "", readOnly: fixed,
  });
  form.append(make("label", {}, `What would make Model ${letter} better? (may stay empty)`, comment));
  if (!fixed) form.append(make("button", { type: "submit", textContent: button }));
  form.onsubmit = guarded(async () => then(await save(form)));
  return form;
}

function save(form) {
  const scores = {};
  for (const name of Object.keys(about.aspects)) scores[name] = Number(form.elements[name].value);
  return ask("POST", "/api/scores", { model: form.dataset.model, scores, comment: form.elements.comment.value });
}

function enterScore() {
  document.querySelector("#score h2").textContent = `What do you think of model ${state.model}?`;
  const form = sheet(state.model, { given: state.scores[state.model], button: "Save and go on", then: show });
  document.querySelector("#score > div").replaceChildren(form);
}

function sheets(fixed) {
  return state.order.map((letter) =>
    sheet(letter, { given: state.scores[letter], fixed, then: (next) => ((state = next), tell(`Model ${letter}: saved.`)) }),
  );
}

function enterReview() {
  document.querySelector("#review > div").replaceChildren(...sheets(false));
}

$("confirm").onclick = guarded(async () => {
  // What was changed and not saved is saved first.
  for (const form of document.querySelectorAll("#review form.sheet")) {
    if (!form.reportValidity()) return;
    await save(form);
  }
  show(await ask("POST", "/api/confirm", {}));
});

function enterDone() {
  document.querySelector("#done > div").replaceChildren(...sheets(true));
}

// A link may bring the key: #key=...; it does not stay in the address.
key = new URLSearchParams(location.hash.slice(1)).get("key") ?? "";
if (key) history.replaceState(null, "", location.pathname);
guarded(load)();

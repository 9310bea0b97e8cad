// The dock: Talk, the text field, Interrupt and End; and the line that tells of a problem.

import { finishedWords } from "./talk.js";

const $ = (id) => document.getElementById(id);

export class Dock {
  // `on.talk()`, `on.words(text)`, `on.interrupt()`, `on.end()`.
  constructor(on) {
    this.on = on;
    this.typed = -Infinity; // when the user last typed, in seconds of the page
    this.canSpeak = true;
    $("talk").onclick = () => on.talk();
    $("end").onclick = () => on.end();
    $("interrupt").onclick = () => (on.interrupt(), $("text").focus());
    $("text").oninput = () => {
      this.typed = performance.now() / 1000;
      if (this.live) this.#words(false);
    };
    $("dock").onsubmit = (e) => {
      e.preventDefault();
      this.#words(true);
    };
    addEventListener("keydown", (e) => {
      if (e.key === "Escape" && !$("interrupt").disabled && !$("drawer").open) on.interrupt();
    });
    const [act, close] = $("problem").querySelectorAll("button");
    act.onclick = () => {
      const { action } = this;
      this.solve();
      action?.();
    };
    close.onclick = () => this.solve();
  }

  #words(all) {
    const words = finishedWords($("text"), all);
    if (words) this.on.words(words);
  }

  speech(possible) {
    this.canSpeak = possible;
  }

  // The microphone's level, as the ring around Talk.
  level(rms) {
    $("talk").style.setProperty("--level", Math.min(1, Math.sqrt(rms * 5)).toFixed(2));
  }

  show({ state, live, speaking, microphone, replaying }) {
    this.live = live;
    const off = state === "off" && !replaying;
    const talk = off ? (this.canSpeak ? "Talk" : "Start") : !this.canSpeak || replaying ? "Typing" : microphone ? "Mute" : "Talk";
    const label = $("talk").lastElementChild;
    if (label.textContent !== talk) label.textContent = talk;
    $("talk").setAttribute("aria-pressed", String(microphone));
    $("talk").dataset.live = off ? "no" : "yes";
    $("talk").disabled = talk === "Typing";
    $("interrupt").disabled = !speaking;
    $("end").disabled = off || state === "ending";
    const end = state === "connecting" || state === "waiting" ? "Cancel" : replaying ? "Stop" : "End";
    if ($("end").textContent !== end) $("end").textContent = end;
    if (!microphone) this.level(0);
  }

  // A line with what is wrong and what can be done about it.
  problem(text, action, act, about = "") {
    this.action = act;
    this.about = about;
    const [button] = $("problem").querySelectorAll("button");
    $("problem").firstElementChild.textContent = text;
    button.textContent = action ?? "";
    button.hidden = !action;
    $("problem").hidden = false;
  }

  shows(about) {
    return !$("problem").hidden && this.about === about;
  }

  solve() {
    $("problem").hidden = true;
    this.action = null;
  }
}

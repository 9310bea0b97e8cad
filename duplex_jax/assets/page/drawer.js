// The settings, their devices, and files of timelines.

import { pairsOf } from "./conversation.js";

const $ = (id) => document.getElementById(id);
const STORED = ["slice_seconds", "idle_bias", "temperature", "system", "turn_based", "volume", "microphone", "speaker"];

export class Drawer {
  // `on.volume(v)`, `on.microphone(id)`, `on.speaker(id)`, `on.replay(name, pairs)`, `on.problem(text)`, `on.download()`.
  constructor(on) {
    this.on = on;
    this.changed = this.#load(); // what the user chose; the server decides the rest
    for (const [id, value] of Object.entries(this.changed)) this.#put(id, value);
    $("settings").onclick = () => this.open();
    $("drawer").onclick = (e) => e.target === $("drawer") && $("drawer").close();
    $("drawer").addEventListener("input", ({ target }) => STORED.includes(target.id) && this.#change(target));
    for (const range of $("drawer").querySelectorAll("input[type=range]")) this.#label(range);
    $("download").onclick = () => on.download();
    $("replay").onchange = () => $("replay").files[0] && this.#replay($("replay").files[0]);
    this.#drop();
    navigator.mediaDevices?.addEventListener?.("devicechange", () => this.devices());
    $("speaker").disabled = !("setSinkId" in AudioContext.prototype);
  }

  async open(focus) {
    $("drawer").showModal();
    if (focus) $(focus).focus();
    await this.devices();
  }

  get(id) {
    return this.changed[id] ?? "";
  }

  get volume() {
    return Number($("volume").value);
  }

  get key() {
    return $("key").value;
  }

  // What `start` says of this conversation: only what the user changed.
  get settings() {
    const { slice_seconds, idle_bias, temperature, system, turn_based } = this.changed;
    const chosen = { mode: turn_based ? "turn_based" : "duplex", system: system || undefined };
    for (const [name, value] of Object.entries({ slice_seconds, idle_bias, temperature })) if (value !== undefined) chosen[name] = Number(value);
    return chosen;
  }

  // Shows what the server decided.
  started({ slice_seconds }) {
    $("slice_seconds").value = slice_seconds;
    this.#label($("slice_seconds"));
  }

  #load() {
    try {
      return JSON.parse(localStorage.getItem("duplex_jax") ?? "{}");
    } catch {
      return {};
    }
  }

  #put(id, value) {
    if ($(id)?.type === "checkbox") $(id).checked = value;
    else if ($(id)) $(id).value = value;
  }

  #change(field) {
    this.changed[field.id] = field.type === "checkbox" ? field.checked : field.value;
    try {
      localStorage.setItem("duplex_jax", JSON.stringify(this.changed));
    } catch {
      // Storage may be forbidden; the choice holds until the page is closed.
    }
    if (field.type === "range") this.#label(field);
    this.on[field.id]?.(field.type === "range" ? Number(field.value) : field.value);
  }

  #label(range) {
    const percent = range.id === "volume" ? `${Math.round(range.value * 100)}%` : range.value + (range.dataset.unit ?? "");
    document.querySelector(`label[for=${range.id}] output`).textContent = percent;
  }

  // Browsers name devices once the microphone was allowed.
  async devices() {
    const all = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
    for (const [id, kind] of [["microphone", "audioinput"], ["speaker", "audiooutput"]]) {
      const known = all.filter((d) => d.kind === kind && d.deviceId && d.deviceId !== "default");
      const options = known.map((d) => new Option(d.label || "Unnamed", d.deviceId));
      $(id).replaceChildren(new Option("Default", ""), ...options);
      $(id).value = known.some((d) => d.deviceId === this.changed[id]) ? this.changed[id] : "";
    }
  }

  #drop() {
    const over = (on) => document.body.classList.toggle("dropping", on);
    addEventListener("dragover", (e) => (e.preventDefault(), over(true)));
    addEventListener("dragleave", (e) => e.relatedTarget ?? over(false));
    addEventListener("drop", (e) => {
      e.preventDefault();
      over(false);
      if (e.dataTransfer.files[0]) this.#replay(e.dataTransfer.files[0]);
    });
  }

  async #replay(file) {
    $("drawer").close();
    $("replay").value = "";
    try {
      const text = (await file.text()).replace(/^\uFEFF/, "");
      this.on.replay(file.name, pairsOf(JSON.parse(text.split("\n")[0])));
    } catch (error) {
      this.on.problem(`${file.name} is not a timeline (${error.message}).`);
    }
  }
}

export function save(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

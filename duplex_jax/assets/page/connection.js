// One conversation's websocket: connecting, the queue, a lost connection taken up again, a server that stops answering.

import { openSocket } from "./talk.js";

const DELAYS = [0.3, 1, 2, 4, 8]; // seconds between attempts to resume; the last one repeats
const GIVE_UP = 300; // seconds without a server
const PATIENCE = 8; // seconds for a connection's first answer

const seconds = () => performance.now() / 1000;

// States: off, connecting, waiting (in the queue), live, silent (no slice for two), reconnecting, ending.
export class Connection {
  // `on.state(state)`, `on.message(message)`, and `on.failed(reason, message)` where it ends for good.
  constructor(on) {
    this.on = on;
    this.state = "off";
    setInterval(() => this.#watch(), 250);
    addEventListener("online", () => this.state === "reconnecting" && this.#redial());
  }

  #become(state) {
    this.state = state;
    this.on.state(state);
  }

  get open() {
    return this.state === "live" || this.state === "silent";
  }

  // Does nothing where a conversation is there already: a double click opens one socket.
  start(settings, key) {
    if (this.state !== "off") return;
    this.key = key;
    this.session = null;
    this.#become("connecting");
    this.#dial({ type: "start", version: 1, ...settings });
  }

  send(message) {
    if (this.open && this.socket.readyState === WebSocket.OPEN) this.socket.send(message instanceof ArrayBuffer ? message : JSON.stringify(message));
  }

  // Asks for what was said, ends the session, and closes.
  end() {
    if (this.state === "off") return;
    if (!this.open) return this.#finish();
    this.send({ type: "timeline" });
    this.send({ type: "end" });
    this.#become("ending");
    this.since = seconds();
  }

  // Drops a connection that may be dead, and resumes.
  redial() {
    if (this.open || this.state === "reconnecting") this.#lost();
  }

  #dial(first) {
    const socket = (this.socket = openSocket("/v1/duplex", this.key));
    this.since = seconds();
    let opened = false;
    let refused = null;
    socket.onopen = () => {
      if (socket !== this.socket) return;
      opened = true;
      socket.send(JSON.stringify(first));
    };
    socket.onmessage = (e) => {
      if (socket !== this.socket) return;
      const message = JSON.parse(e.data);
      this.since = seconds();
      if (message.type === "error" && !this.open && this.state !== "ending") {
        refused = message;
        socket.close();
        return;
      }
      if (message.type === "error" && message.fatal) refused = message;
      this.#take(message);
    };
    socket.onclose = () => {
      if (socket !== this.socket) return;
      if (this.state === "ending") this.#finish();
      else if (refused) this.#finish(refused.code, refused.message);
      else if (this.session) this.open ? this.#lost() : this.#retry();
      else if (opened) this.#finish("lost", "The server closed the connection.");
      else this.#explain();
    };
  }

  #take(message) {
    if (message.type === "started") {
      this.session = message;
      this.attempts = 0;
      this.#become("live");
    } else if (message.type === "waiting") {
      this.place = message.place;
      this.#become("waiting");
    } else if (this.state === "silent") this.#become("live");
    this.on.message(message);
  }

  #lost() {
    this.attempts = 0;
    this.lostAt = seconds();
    this.#become("reconnecting");
    this.#retry();
  }

  #retry() {
    this.#drop();
    if (seconds() - this.lostAt > GIVE_UP) return this.#finish("lost", "The connection was lost.");
    const delay = DELAYS[Math.min(this.attempts++, DELAYS.length - 1)];
    this.timer = setTimeout(() => this.#redial(), delay * 1000);
  }

  #redial() {
    clearTimeout(this.timer);
    this.#drop();
    this.#dial({ type: "resume", session: this.session.session, token: this.session.token });
  }

  #drop() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  #finish(reason, message) {
    clearTimeout(this.timer);
    this.#drop();
    this.#become("off");
    if (reason) this.on.failed(reason, message);
  }

  // A browser does not tell why a websocket was refused; an ordinary request does.
  async #explain() {
    const socket = this.socket;
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const answer = await fetch("/v1/models", { headers }).catch(() => null);
    if (socket !== this.socket) return;
    if (answer === null) this.#finish("unreachable", "The server cannot be reached.");
    else if (answer.status === 401) this.#finish("key", this.key ? "The server does not take this key." : "The server asks for a key.");
    else if (answer.ok) this.#finish("refused", "The server refused the connection.");
    else this.#finish("refused", `The server refused the connection (${answer.status}).`);
  }

  #watch() {
    const quiet = seconds() - this.since;
    const k = this.session?.slice_seconds;
    if (this.state === "live" && quiet > 2 * k) this.#become("silent");
    else if (this.state === "silent" && quiet > Math.max(20, 6 * k)) this.redial();
    else if (this.state === "connecting" && quiet > PATIENCE) this.#finish("unreachable", "The server is not answering.");
    else if (this.state === "reconnecting" && this.socket && quiet > PATIENCE) this.#retry();
    else if (this.state === "ending" && quiet > 3) this.#finish();
  }
}

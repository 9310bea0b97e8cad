// Two lanes on one time axis, drawn on a canvas: level bars, words as chips at their time, ticks, "now" at 80 per cent.
// Wide windows have time to the right, narrow ones downwards.

import { STEP } from "./audio.js";
import { heardOf, timed } from "./conversation.js";

const NOW = 0.8;
const FONT = "13px system-ui, sans-serif";
const SMALL = "11px system-ui, sans-serif";
const CHIP = 22; // height of a chip
const GAP = 4;
const COLOURS = ["card", "fore", "idle", "line", "edge", "you", "you-tint", "it", "it-tint", "warn"];

export class Lanes {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => (this.#colours(), this.draw()));
    this.#colours();
    new ResizeObserver(() => this.#size()).observe(canvas);
    this.#size();
  }

  // Shows a conversation; `clock` gives its time, in seconds.
  show(conversation, clock) {
    Object.assign(this, { conversation, clock });
    this.draw();
  }

  // Moves with the clock until told to stop.
  run(on) {
    cancelAnimationFrame(this.frame);
    clearInterval(this.timer);
    if (!on) return this.draw();
    if (this.still.matches) {
      this.timer = setInterval(() => this.draw(), 1000);
      return;
    }
    const step = () => {
      this.draw();
      this.frame = requestAnimationFrame(step);
    };
    step();
  }

  #colours() {
    const style = getComputedStyle(document.documentElement);
    this.colour = Object.fromEntries(COLOURS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  #size() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.down = innerWidth <= 720;
    this.along = this.down ? height : width;
    this.scale = this.down ? 30 : 92; // pixels a second
    Object.assign(this, { width, height, middle: this.down ? width / 2 : (height + 20) / 2 });
    this.draw();
  }

  // Where a moment is.
  #at(time) {
    return this.along * NOW + (time - this.now) * this.scale;
  }

  draw() {
    if (!this.conversation || !this.along) return;
    const { context: c, colour } = this;
    this.now = this.clock();
    c.clearRect(0, 0, this.width, this.height);
    this.#ticks();
    for (const { at, seconds } of this.conversation.bargeIns) this.#line(this.#at(at + seconds), colour.warn, 2);
    this.#levels("you");
    this.#levels("it");
    this.#words();
    for (const bargeIn of this.conversation.bargeIns) this.#stopped(bargeIn);
    this.#line(this.along * NOW, colour.fore, 1.5);
    this.#frame();
  }

  #line(at, colour, width, dash = []) {
    const { context: c } = this;
    c.strokeStyle = colour;
    c.lineWidth = width;
    c.setLineDash(dash);
    c.beginPath();
    const x = Math.round(at) + 0.5;
    if (this.down) (c.moveTo(0, x), c.lineTo(this.width, x));
    else (c.moveTo(x, 20), c.lineTo(x, this.height));
    c.stroke();
    c.setLineDash([]);
  }

  #ticks() {
    const { context: c, colour, conversation: { k, tick } } = this;
    const first = this.now - (this.along * NOW) / this.scale;
    const last = this.now + (this.along * (1 - NOW)) / this.scale;
    c.font = SMALL;
    c.textBaseline = "middle";
    c.textAlign = this.down ? "left" : "center";
    for (let t = tick + Math.ceil((first - tick) / k) * k; t <= last; t += k) {
      if (t < -0.01) continue;
      const at = this.#at(t);
      this.#line(at, colour.line, 1);
      if (!this.down && Math.abs(at - this.along * NOW) > 34) this.#text(clock(t), at, 11, colour.idle);
    }
    c.textAlign = "left";
  }

  #text(text, x, y, colour) {
    this.context.fillStyle = colour;
    this.context.fillText(text, x, y);
  }

  #levels(who) {
    const { context: c, colour, middle } = this;
    const most = this.down ? 26 : 30;
    const width = Math.max(2, STEP * this.scale - 2);
    for (let i = this.conversation.levels[who].length - 1; i >= 0; i--) {
      const { at: time, level, unheard } = this.conversation.levels[who][i];
      const at = this.#at(time);
      if (at < -10) break;
      const size = Math.min(1, Math.sqrt(level * 4)) * most;
      if (size < 2.5) continue;
      c.fillStyle = unheard ? colour.line : colour[who];
      const from = who === "you" ? middle - 1 - size : middle + 1;
      c.beginPath();
      if (this.down) c.roundRect(from, at, size, width, 1);
      else c.roundRect(at, from, width, size, 1);
      c.fill();
    }
  }

  // Chips of both sides, each beside the ones before it.
  #words() {
    const { conversation } = this;
    const ends = { you: [], it: [] };
    const oldest = this.now - (this.along * NOW) / this.scale - 8;
    for (const slice of conversation.slices) {
      if (!slice || slice.until < oldest) continue;
      if (slice.user !== null) for (const w of timed(slice.user, slice.start, slice.end)) this.#chip("you", w, "", ends.you);
      const [heard] = heardOf(slice);
      const length = Math.max(slice.until - slice.from, Math.min(conversation.k, 0.3 * (slice.assistant?.split(" ").length ?? 0)));
      for (const w of timed(slice.assistant ?? "", slice.from, slice.from + length)) {
        const kind = w.start + w.word.length <= heard.length ? "" : slice.cancelled ? "cancelled" : "unheard";
        this.#chip("it", w, kind, ends.it);
      }
      if (slice.cancelled && slice.assistant === null) this.#chip("it", { word: "   ", at: slice.from }, "cancelled", ends.it);
    }
    const ahead = [];
    for (const { word } of conversation.waiting) this.#chip("you", { word, at: this.now + 8 / this.scale }, "waiting", ahead);
  }

  #chip(who, { word, at: time }, kind, ends) {
    const { context: c } = this;
    c.font = FONT;
    const width = c.measureText(word).width + 12;
    const at = this.#at(time);
    // Places are kept in time, so that a chip does not jump as the lanes move.
    const [x, y] = this.down ? this.#below(who, at, width, ends) : this.#beside(who, at, width, ends);
    if (x + width < 0 || x > this.width || y + CHIP < 0 || y > this.height) return;
    this.#paint(who, word, kind, x, y, width);
  }

  // Time to the right: the first of three rows that is free, or the one that is free first.
  #beside(who, at, width, ends) {
    const rows = Math.max(1, Math.min(3, Math.floor((this.middle - 20 - 34) / (CHIP + GAP))));
    let row = 0;
    for (let r = 0; r < rows; r++) {
      if ((ends[r] ?? -Infinity) + GAP <= at) {
        row = r;
        break;
      }
      if ((ends[r] ?? -Infinity) < (ends[row] ?? -Infinity)) row = r;
    }
    const x = Math.max(at, (ends[row] ?? -Infinity) + GAP);
    ends[row] = x + width;
    const step = CHIP + GAP;
    return [x, who === "you" ? this.middle - 36 - (rows - row) * step + GAP : this.middle + 36 + row * step];
  }

  // Time downwards: words follow each other in lines, a line no earlier than its first word.
  #below(who, at, width, ends) {
    const [left, right] = who === "you" ? [6, this.middle - 30] : [this.middle + 30, this.width - 6];
    let [x, y] = ends.length ? ends : [left, at];
    if (!ends.length || x + width > right || at > y + CHIP + GAP) {
      y = ends.length ? Math.max(y + CHIP + GAP - 2, at) : at;
      x = left;
    }
    ends[0] = x + width + GAP;
    ends[1] = y;
    return [x, y];
  }

  #paint(who, word, kind, x, y, width) {
    const { context: c, colour } = this;
    const waiting = kind === "waiting";
    const dropped = kind === "unheard" || kind === "cancelled";
    c.beginPath();
    c.roundRect(x, y, width, CHIP, 6);
    c.fillStyle = waiting || dropped ? colour.card : colour[`${who}-tint`];
    c.fill();
    if (waiting || dropped) {
      c.strokeStyle = waiting ? colour[who] : colour.line;
      c.lineWidth = 1;
      c.setLineDash(waiting ? [3, 3] : []);
      c.stroke();
      c.setLineDash([]);
    }
    if (kind === "cancelled") this.#hatch(x, y, width);
    c.textBaseline = "middle";
    const ink = dropped ? colour.idle : colour[who];
    this.#text(word, x + 6, y + CHIP / 2 + 1, ink);
    if (kind === "unheard") {
      c.fillStyle = ink;
      c.fillRect(x + 4, y + CHIP / 2, width - 8, 1.2);
    }
  }

  #hatch(x, y, width) {
    const { context: c, colour } = this;
    c.save();
    c.clip();
    c.strokeStyle = colour.edge;
    c.globalAlpha = 0.45;
    c.beginPath();
    for (let i = -CHIP; i < width; i += 6) (c.moveTo(x + i, y + CHIP), c.lineTo(x + i + CHIP, y));
    c.stroke();
    c.restore();
  }

  #stopped({ at: time, seconds }) {
    const at = this.#at(time + seconds);
    if (at < -160 || at > this.along) return;
    const { context: c, colour } = this;
    const text = `stopped in ${seconds.toFixed(1)} s`;
    c.font = SMALL;
    const width = c.measureText(text).width + 12;
    const [x, y] = this.down ? [this.middle - width - 4, at - 21] : [at - width / 2, this.height - 22];
    c.fillStyle = colour.warn;
    c.beginPath();
    c.roundRect(x, y, width, 18, 9);
    c.fill();
    this.#text(text, x + 6, y + 9.5, colour.card);
  }

  // What does not move: the names of the lanes, the line between them, "now".
  #frame() {
    const { context: c, colour, middle } = this;
    c.strokeStyle = colour.line;
    c.lineWidth = 1;
    c.beginPath();
    if (this.down) (c.moveTo(middle, 0), c.lineTo(middle, this.height));
    else (c.moveTo(0, middle), c.lineTo(this.width, middle));
    c.stroke();
    const tags = this.down
      ? [["You", 6, 4, "you"], ["Assistant", middle + 6, 4, "it"], ["now", middle - 44, this.along * NOW - 9, "fore"]]
      : [["You", 10, 26, "you"], ["Assistant", 10, this.height - 26, "it"], ["now", this.along * NOW - 17, 2, "fore"]];
    c.font = "600 12px system-ui, sans-serif";
    if (this.down) {
      c.fillStyle = colour.card;
      c.fillRect(0, 0, this.width, 26);
      c.fillStyle = colour.line;
      c.fillRect(0, 26, this.width, 1);
    }
    for (const [name, x, y, ink] of tags) {
      const width = c.measureText(name).width + 12;
      c.fillStyle = colour.card;
      c.beginPath();
      c.roundRect(x, y, width, 19, 6);
      c.fill();
      this.#text(name, x + 6, y + 10, colour[ink]);
    }
  }
}

// Seconds as 0:07.
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

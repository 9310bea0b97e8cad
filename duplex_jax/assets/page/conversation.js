// What was said, when, and how much of it was heard. Times are seconds since the conversation began. No DOM here.

const SENTENCE = /[.!?]+["'”’)\]]*(?=\s|$)/;
const GOES_ON = /^\s*[,.;:!?…'’)\]\p{Ll}]/u;
const LEVELS_KEPT = 120;
export const LOUD = 0.02; // root mean square from which the microphone counts as loud

export class Conversation {
  constructor(sliceSeconds = 2, audio = false) {
    this.k = sliceSeconds;
    this.audio = audio;
    this.slices = []; // by their number: {index, start, end, user, assistant, from, until, heard, ...}
    this.levels = { you: [], it: [] }; // {at, level, unheard}
    this.waiting = []; // words that were sent and that no slice has taken yet: {word, at}
    this.bargeIns = []; // {at, seconds, index of the slice in which it fell}
    this.latencies = [];
    this.lastWord = null; // when the user's newest word ended; null once it is answered
    this.tick = 0; // a moment at which the server's clock ticked
  }

  // A slice arrives at `now`: the user's words belong to the interval before it, the assistant's are said from now on.
  add(message, now) {
    const { user, assistant, late = 0, cancelled = false } = message;
    const index = message.slice ?? this.slices.length;
    const before = this.slices[index - 1];
    const end = now - late;
    const start = before && end - before.end < 1.5 * this.k ? before.end : Math.max(0, end - this.k);
    this.tick = end;
    const typed = [];
    for (const word of user?.split(/\s+/) ?? []) if (this.waiting[0]?.word === word) typed.push(this.waiting.shift().at);
    const loud = this.levels.you.find((l) => l.at >= start && l.level > LOUD)?.at;
    const began = Math.min(Math.max(start, typed[0] ?? loud ?? start), end);
    const slice = { index, start: began, end, user, assistant, from: now, until: now + this.k, heard: null, cancelled, late };
    this.slices[index] = slice;
    const last = this.bargeIns.at(-1);
    if (last && last.index === undefined) {
      if (last.at <= end) last.index = index;
    } else if (!this.audio && user !== null && before?.assistant && assistant === null) {
      const at = Math.max(slice.start, before.from);
      this.bargeIns.push({ at, seconds: now - at, index });
      before.stopped = true;
    }
    if (typed.length) this.lastWord = Math.max(this.lastWord ?? 0, typed.at(-1));
    if (!this.audio && assistant !== null && !before?.assistant) this.#answered(now);
    if (this.audio && assistant !== null) slice.until = now; // until its sound comes
    return slice;
  }

  // The sound of a slice: levels every `step` seconds, heard from `at` on.
  sound(index, at, levels, step) {
    const slice = this.slices[index];
    const until = at + levels.length * step;
    if (slice) [slice.from, slice.until] = [at, until];
    this.levels.it.push(...levels.map((level, i) => ({ at: at + i * step, level, unheard: false })));
    this.#answered(at);
  }

  #answered(at) {
    if (this.lastWord !== null && at > this.lastWord) this.latencies.push(at - this.lastWord);
    this.lastWord = null;
  }

  // A level of the microphone.
  hear(at, level) {
    const you = this.levels.you;
    you.push({ at, level });
    for (const levels of [you, this.levels.it]) if (levels[0]?.at < at - LEVELS_KEPT) levels.splice(0, levels.length >> 1);
  }

  type(words, at) {
    for (const word of words.split(/\s+/)) this.waiting.push({ word, at });
  }

  // The assistant fell silent at `now`, because the user had begun to speak at `at`, or pressed the button.
  stop(at, now) {
    this.bargeIns.push({ at, seconds: now - at });
    for (const level of this.levels.it) if (level.at > now) level.unheard = true;
    for (const slice of this.slices.slice(-4)) if (slice?.until > now) slice.stopped = true;
  }

  // Of a slice so many characters were heard; of later ones nothing.
  heard(index, characters) {
    if (index === null) return;
    for (const slice of this.slices.slice(index)) {
      if (slice?.assistant == null) continue;
      const count = slice.index === index ? characters : 0;
      slice.heard = Math.min(slice.heard ?? Infinity, count);
    }
  }

  // The newest slice in which the assistant speaks is silenced.
  cancel() {
    const slice = this.slices.findLast((s) => s?.assistant != null);
    if (slice) [slice.cancelled, slice.heard] = [true, slice.heard ?? 0];
  }

  // The server's own timeline, from slice `first` on: fills what never came, and strikes out what it no longer holds.
  reconcile(pairs, first, now) {
    pairs.forEach(([user, assistant], i) => {
      const index = first + i;
      const slice = this.slices[index];
      if (!slice) {
        const end = now - (pairs.length - i) * this.k;
        this.slices[index] = { index, start: Math.max(0, end - this.k), end, user, assistant, from: Math.max(0, end), until: end + this.k, heard: null, cancelled: false, late: 0 };
      } else if (slice.assistant !== null && slice.assistant.startsWith(assistant ?? "") && slice.assistant !== assistant) {
        slice.heard = (assistant ?? "").length;
      }
    });
  }

  // Whether the assistant is to be seen or heard at `now`.
  speaking(now) {
    return this.slices.slice(-6).some((s) => s?.assistant != null && !s.stopped && s.heard === null && s.from <= now && now < s.until);
  }

  get latency() {
    const sorted = this.latencies.toSorted((a, b) => a - b);
    return sorted.length ? (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2 : null;
  }
}

// The assistant's words in a slice: [heard, not heard].
export function heardOf(slice) {
  const text = slice.assistant ?? "";
  return slice.heard === null ? [text, ""] : [text.slice(0, slice.heard), text.slice(slice.heard)];
}

// Slices joined into sentences, in the order in which they began: {who, at, parts: [{text, kind}], finished, slice}.
// `kind` is "", "unheard" or "cancelled".
export function sentences(slices) {
  const all = [];
  const open = { you: null, it: null };
  const last = { you: null, it: null };

  function add(who, text, kind, at, slice) {
    while (text) {
      let sentence = open[who];
      if (!sentence) {
        // What goes on where the speaker had paused belongs to the same sentence.
        const before = last[who];
        const ended = before && SENTENCE.test(before.parts.map((p) => p.text).join("").trimEnd().slice(-3));
        if (before && before === all.at(-1) && GOES_ON.test(text) && (!ended || /^\s*[,.;:!?]/.test(text))) sentence = before;
        else if (!text.trim()) return;
        else all.push((sentence = { who, at, parts: [], finished: false, slice }));
        open[who] = last[who] = sentence;
      }
      const match = SENTENCE.exec(text);
      const cut = match ? match.index + match[0].length : text.length;
      const part = sentence.parts.length ? text.slice(0, cut) : text.slice(0, cut).trimStart();
      const previous = sentence.parts.at(-1);
      if (previous?.kind === kind) previous.text += part;
      else sentence.parts.push({ text: part, kind });
      sentence.finished = match !== null;
      if (match) open[who] = null;
      text = text.slice(cut);
    }
  }

  function pause(who) {
    if (open[who]) open[who].finished = true;
    open[who] = null;
  }

  for (const slice of slices) {
    if (!slice) continue;
    if (slice.user === null) pause("you");
    else add("you", open.you || last.you === all.at(-1) ? ` ${slice.user}` : slice.user, "", slice.start, slice.index);
    if (slice.assistant === null) pause("it");
    const [heard, unheard] = heardOf(slice);
    add("it", heard, "", slice.from, slice.index);
    add("it", unheard, slice.cancelled ? "cancelled" : "unheard", slice.from, slice.index);
  }
  return all.sort((a, b) => a.at - b.at);
}

// Words with their times, spread over [from, until] by their letters: {word, at, start} with `start` in characters.
export function timed(text, from, until) {
  const words = [...text.matchAll(/\S*[\p{L}\p{N}]\S*/gu)]; // marks alone are no word
  return words.map((m) => ({ word: m[0], start: m.index, at: from + ((until - from) * m.index) / Math.max(1, text.length) }));
}

// A timeline file's slices as pairs; silence is null.
export function pairsOf(row) {
  const output = row?.output;
  if (!Array.isArray(output) || !output.length || output.length % 2) throw new Error('no pairs of slices in "output"');
  const read = ({ content }) => (content === "<idle>" ? null : content.replace(/<\\(\\*)idle>/g, "<$1idle>"));
  return Array.from({ length: output.length / 2 }, (_, i) => [read(output[2 * i]), read(output[2 * i + 1])]);
}

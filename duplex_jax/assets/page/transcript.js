// The transcript: slices joined into sentences, or the table of slices; finished sentences are read out.

import { heardOf, sentences } from "./conversation.js";
import { clock } from "./lanes.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 400; // sentences or rows kept in the document
const NAMES = { you: "You", it: "Assistant" };

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  return made;
}

// [heard, not heard] as nodes.
function spoken(parts) {
  return parts.filter((p) => p.text).map(({ text, kind }) => (kind ? element("del", text, kind) : element("span", text)));
}

function row(utterance) {
  const { who, at } = utterance[0];
  const item = element("li", "", who);
  const paragraph = element("p");
  for (const sentence of utterance) {
    const span = element("span");
    span.title = clock(sentence.at);
    span.append(...spoken(sentence.parts));
    paragraph.append(span, " ");
  }
  item.append(element("b", NAMES[who]), paragraph, element("time", clock(at)));
  return item;
}

const isSilent = ({ user, assistant, cancelled }) => user === null && assistant === null && !cancelled;

function tableRow(slice, bargeIn, k) {
  const { index, user, assistant, late } = slice;
  const line = element("tr");
  const [heard, unheard] = heardOf(slice);
  const said = element("td", "", "it");
  if (assistant === null) said.textContent = slice.cancelled ? "cancelled" : "·";
  else said.append(...spoken([{ text: heard }, { text: unheard, kind: slice.cancelled ? "cancelled" : "unheard" }]));
  line.append(element("td", slice.first === undefined ? index : `${slice.first}–${index}`), element("td", user ?? "·", "you"), said, element("td", late.toFixed(2)));
  if (late > k / 2) line.classList.add("late");
  if (bargeIn) {
    line.classList.add("barge");
    line.title = `You interrupted here; it stopped in ${bargeIn.seconds.toFixed(1)} s`;
  }
  return line;
}

export class Transcript {
  constructor() {
    for (const [button, other] of [["as-sentences", "as-slices"], ["as-slices", "as-sentences"]]) {
      $(button).onclick = () => {
        $(button).setAttribute("aria-pressed", "true");
        $(other).setAttribute("aria-pressed", "false");
        $("sentences").hidden = button !== "as-sentences";
        $("slices").hidden = button === "as-sentences";
        this.#toEnd();
      };
    }
    new ResizeObserver(() => this.#toEnd()).observe($("scroll"));
    this.clear();
  }

  clear() {
    this.drawn = { sentences: [], slices: [] }; // what each child shows
    this.told = 0;
    $("sentences").replaceChildren();
    $("slices").tBodies[0].replaceChildren();
    $("spoken").replaceChildren();
  }

  update(conversation) {
    const box = $("scroll");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    const all = sentences(conversation.slices);
    const utterances = [];
    for (const sentence of all) {
      if (utterances.at(-1)?.[0].who === sentence.who) utterances.at(-1).push(sentence);
      else utterances.push([sentence]);
    }
    this.#sync($("sentences"), "sentences", utterances.slice(-SHOWN), row);
    const marks = Object.fromEntries(conversation.bargeIns.map((b) => [b.index, b]));
    const rows = [];
    for (const slice of conversation.slices.slice(-SHOWN)) {
      if (!slice) continue;
      const [before, mark] = rows.at(-1) ?? [];
      const same = before && !mark && !marks[slice.index] && isSilent(before) && isSilent(slice);
      if (same) rows.pop(); // a run of silence is one row
      rows.push([same ? { ...slice, first: before.first ?? before.index } : slice, marks[slice.index]]);
    }
    this.#sync($("slices").tBodies[0], "slices", rows, ([slice, mark]) => tableRow(slice, mark, conversation.k));
    if (atEnd) this.#toEnd();
    this.#tell(all.filter((s) => s.who === "it"), conversation);
  }

  // Draws what changed and no more.
  #sync(parent, name, items, draw) {
    const keys = items.map((item) => JSON.stringify(item));
    const drawn = this.drawn[name];
    // Where the oldest ones go, the rest stays as it is.
    while (drawn.length && keys.length && drawn[0] !== keys[0] && drawn.length >= SHOWN) {
      drawn.shift();
      parent.firstElementChild.remove();
    }
    items.forEach((item, i) => {
      if (drawn[i] === keys[i]) return;
      const node = draw(item);
      if (parent.children[i]) parent.children[i].replaceWith(node);
      else parent.append(node);
      drawn[i] = keys[i];
    });
    while (parent.children.length > items.length) parent.lastElementChild.remove();
    drawn.length = items.length;
  }

  #toEnd() {
    $("scroll").scrollTop = $("scroll").scrollHeight;
  }

  // Screen readers get the assistant's sentences once each, when they are over, as far as they were heard.
  #tell(said, conversation) {
    if (conversation !== this.conversation) [this.conversation, this.told] = [conversation, 0];
    while (this.told < said.length && said[this.told].finished) {
      const text = said[this.told++].parts.filter((p) => !p.kind).map((p) => p.text).join("");
      if (text.trim()) $("spoken").append(element("p", text));
    }
    while ($("spoken").children.length > 3) $("spoken").firstElementChild.remove();
  }
}

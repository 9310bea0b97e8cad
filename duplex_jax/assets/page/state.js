// What the page says that is going on, in words; their colour is in page.css.

const OFF = { ready: "Ready", ended: "Ended", failed: "Not connected", replaying: "Replaying" };

// Gives {name, text}; `name` chooses the colour.
export function stateOf({ connection, outcome, conversation, speaking, hearing, now }) {
  switch (connection.state) {
    case "off":
      return { name: outcome, text: OFF[outcome] };
    case "connecting":
      return { name: "connecting", text: "Connecting" };
    case "waiting":
      return { name: "queue", text: `Place ${connection.place} in the queue` };
    case "reconnecting":
      return { name: "reconnecting", text: "Reconnecting" };
    case "silent":
      return { name: "silent", text: "The server is not answering" };
    case "ending":
      return { name: "ended", text: "Ending" };
  }
  if (hearing) return { name: "hearing", text: "Hearing you" };
  if (speaking) return { name: "speaking", text: "Speaking" };
  const last = conversation.slices.at(-1);
  if (last?.late > conversation.k / 2) return { name: "late", text: `Late by ${last.late.toFixed(1)} s` };
  // The model may choose to say nothing: after a while it listens again.
  const asked = conversation.waiting.length > 0 || (conversation.lastWord !== null && now - conversation.lastWord < 3 * conversation.k);
  return asked ? { name: "thinking", text: "Thinking" } : { name: "listening", text: "Listening" };
}

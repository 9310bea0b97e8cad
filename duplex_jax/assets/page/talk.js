// What every page that talks shares: a websocket with its key, and words that go out as they are typed.

export function openSocket(path, key) {
  const secure = location.protocol === "https:" ? "wss" : "ws";
  const protocols = ["duplex-jax"];
  if (key) protocols.push(`duplex-jax-key.${key}`);
  return new WebSocket(`${secure}://${location.host}${path}`, protocols);
}

// Takes the words that are finished out of a text field: those with white space behind them, or all. "" where there are none.
export function finishedWords(field, all) {
  const text = field.value;
  if (!all && !/\S\s$/.test(text)) return "";
  const cut = all ? text.length : text.lastIndexOf(" ");
  const words = text.slice(0, cut).trim();
  if (words) field.value = text.slice(cut).trimStart();
  return words;
}

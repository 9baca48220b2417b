// The text, token by token, and the list of tokens by what they gained or lost.

const STEPS = [0.5, 1, 2, 4]; // bits at which a colour begins
const SHOWN = 200; // tokens of the list that are drawn at a time

function colour(bits) {
  if (bits === null || Math.abs(bits) < STEPS[0]) return "";
  const level = STEPS.filter((step) => Math.abs(bits) >= step).length;
  return (bits > 0 ? "gain" : "loss") + level;
}

function described(token, bits) {
  if (bits === null) return visible(token.text, token.symbol);
  const how = bits < 0 ? "lost" : "gained";
  return `${visible(token.text, token.symbol)}, ${how} ${signed(Math.abs(bits)).replace("+", "")} bits`;
}

function option(token, bits, kind, ...children) {
  const properties = { class: `${kind} ${colour(bits)}`, role: "option", tabindex: -1, "data-index": token.index, "aria-selected": "false" };
  return element("span", { ...properties, "aria-label": described(token, bits) }, ...children);
}

// Space around a word stands outside of its colour; one that begins a line is left out.
function drawText(text, expert) {
  const both = text.given > 0 && text.given < text.tokens.length;
  const parts = [];
  for (const token of text.tokens) {
    if (both && token.index === text.given) parts.push(element("span", { class: "border", "aria-label": "Here the model begins to write" }));
    const word = token.text.trim();
    const before = word ? token.text.slice(0, token.text.indexOf(word)) : token.text.replace(/\n[^]*/, "");
    const after = word ? token.text.slice(before.length + word.length) : token.text.slice(before.length);
    const kind = `token${both && token.given ? " given" : ""}${word ? "" : " space"}`;
    const drawn = option(token, bitsOf(token, expert), kind, visible(token.text, token.symbol));
    token.drawn = drawn;
    const begins = token.index === 0 || text.whole[token.start - 1] === "\n";
    parts.push(begins ? before.replace(/^ /, "") : before, drawn, after);
  }
  byId("text").replaceChildren(...parts);
}

function around(text, token, width = 44) {
  const end = token.start + token.text.length;
  const space = /^\s/.test(token.text) ? " " : "";
  const before = text.whole.slice(Math.max(0, token.start - width), token.start) + space;
  return [
    element("span", { class: "before" }, element("bdi", {}, before.replace(/\s+/g, " "))),
    element("mark", {}, visible(token.text, token.symbol)),
    element("bdi", { class: "after" }, text.whole.slice(end, end + width).replace(/\s+/g, " ")),
  ];
}

function drawRanking(text, tokens, expert, most) {
  const rows = tokens.slice(0, most).map((token) => {
    const bits = bitsOf(token, expert);
    const number = element("span", { class: `number ${bits < 0 ? "lost" : "gained"}` }, signed(bits));
    return option(token, bits, "row", number, element("span", { class: "around" }, around(text, token)));
  });
  byId("ranking").replaceChildren(...rows);
  byId("more").hidden = tokens.length <= most;
}

// Tokens to show, in their order.
function chosenTokens(text, filter) {
  const fits = tokensFound(text, filter);
  const { kind, order, expert } = filter;
  const bits = (token) => bitsOf(token, expert);
  const tokens = text.tokens.filter((token) => {
    if (fits && !fits.has(token)) return false;
    if (kind === "all") return true;
    return kind === "gain" ? bits(token) >= STEPS[0] : bits(token) !== null && bits(token) <= -STEPS[0];
  });
  if (order === "text") return tokens;
  const sign = order === "gain" ? -1 : 1;
  return tokens.filter((token) => bits(token) !== null).sort((a, b) => sign * (bits(a) - bits(b)) || a.index - b.index);
}

// Tokens where the words that are looked for stand, in the text or in a source; null where nothing is.
function tokensFound(text, { query, scope }) {
  if (!query) return null;
  const found = new Set();
  if (scope !== "sources") {
    const whole = text.whole.toLowerCase();
    let next = 0;
    for (let at = whole.indexOf(query); at >= 0; at = whole.indexOf(query, at + query.length)) {
      while (next < text.tokens.length && text.tokens[next].start + text.tokens[next].text.length <= at) next++;
      for (let i = next; i < text.tokens.length && text.tokens[i].start < at + query.length; i++) found.add(text.tokens[i]);
    }
  }
  if (scope !== "text") for (const token of text.tokens) if (token.sources.some((source) => sourceHas(source, query))) found.add(token);
  return found;
}

function sourceHas(source, query) {
  source.words ??= [source.before ?? "", source.value, source.after ?? "", "\n", source.document ?? ""].join("").toLowerCase();
  return source.words.includes(query);
}

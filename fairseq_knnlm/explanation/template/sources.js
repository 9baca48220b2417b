// The entries behind a token, and the tokens that an entry helped.

const LISTED = 50; // tokens that an entry or a document helped

function sourceCard(state, token, source) {
  const memory = state.record.run.memories[source.memory];
  const named = source.document ? element("bdi", { class: "document" }, source.document) : element("span", { class: "document none" }, memory ? memory.name : "datastore");
  const facts = [`row ${count(source.row)}`, `distance ${source.distance.toPrecision(4)}`];
  if (state.record.run.memories.length > 1 && memory) facts.unshift(memory.name);
  const head = element("span", { class: "head" }, named, element("span", { class: "share" }, bar(source.share, source.agrees ? "agrees" : ""), percent(source.share)));
  const button = element("button", { type: "button", "aria-expanded": "false", on: { click: () => state.chooseSource(source) } },
    head, sourceText(state.text, token, source), element("span", { class: "facts" }, facts.join(" \u00b7 ")));
  const card = element("li", { class: `source ${source.agrees ? "agrees" : "differs"}`, "data-row": source.row, "data-memory": source.memory }, button);
  return card;
}

function sourceText(text, token, source) {
  const value = element("strong", { class: "value", title: source.agrees ? "the token that came" : "another token" }, visible(source.value));
  if (source.before === null && source.after === null) return element("span", { class: "words" }, value, element("em", {}, " the datastore no longer knows what stands around"));
  const before = (source.before ?? "").replace(/^\s+/, "");
  const split = before.length - Math.min(before.length, matchedLength(text, token, source));
  const gap = /^\s/.test(source.value) ? " " : "";
  return element("span", { class: "words", lang: "" }, "\u2026",
    element("bdi", {}, lined(before.slice(0, split)), element("mark", {}, lined(before.slice(split))), gap, value, lined(source.after ?? "")), "\u2026");
}

const lined = (text) => text.replace(/\s*\n\s*/g, " \u21b5 ");

// Whom a source helped: the same entry, and others of its document.
function helpedBy(state, source) {
  state.helped ??= whomTheyHelped(state.record.texts);
  const same = state.helped.entries.get(entryKey(source)) ?? [];
  const document = (state.helped.documents.get(documentKey(source)) ?? []).filter((found) => entryKey(found.source) !== entryKey(source));
  const seen = new Set(same.map((found) => found.token));
  const others = document.filter((found) => !seen.has(found.token) && seen.add(found.token));
  return { same, others };
}

function helpedLists(state, source) {
  const { same, others } = helpedBy(state, source);
  return element("div", { class: "helped" },
    helpedList(state, same.length ? `This entry helped ${plural(same.length, "token")}` : "This entry helped no token", same),
    others.length > 0 && helpedList(state, `Its document helped ${plural(others.length, "more token", "more tokens")}`, others));
}

function helpedList(state, title, found) {
  const rows = found.slice(0, LISTED).map(({ text, token, source }) => {
    const where = text === state.text ? "" : text.name;
    const go = () => state.goTo(text, token);
    return element("li", {}, element("button", { type: "button", "data-index": token.index, on: { click: go } },
      element("span", { class: "around" }, where && element("em", {}, `${where} `), around(text, token, 24)), element("span", { class: "number" }, percent(source.share))));
  });
  const rest = found.length - rows.length;
  return [element("h4", {}, title), element("ul", {}, rows), rest > 0 && element("p", { class: "hint" }, `and ${count(rest)} more, outlined in the text`)];
}

function markHelped(state, source) {
  for (const node of document.querySelectorAll(".by-entry, .by-document")) node.classList.remove("by-entry", "by-document");
  if (!source) return;
  const { same, others } = helpedBy(state, source);
  for (const { text, token } of same) if (text === state.text) token.drawn.classList.add("by-entry");
  for (const { text, token } of others) if (text === state.text) token.drawn.classList.add("by-document");
}

// What is known of one token: experts, alternatives, agreement, sources.

function part(title, ...children) {
  return element("section", {}, element("h3", {}, title), ...children);
}

function drawDetails(state) {
  const place = byId("details");
  const { token } = state;
  place.classList.toggle("chosen", Boolean(token));
  place.replaceChildren(...(token ? aboutToken(state, token) : whereToBegin(state)));
  place.scrollTop = 0;
}

function aboutToken(state, token) {
  return [heading(state, token), probabilities(token), experts(token), alternatives(token), sources(state, token), part("Where the neighbours lie", drawPicture(token, state.showSource))].filter(Boolean);
}

function heading(state, token) {
  const { text } = state;
  const number = `${token.given && text.given < text.tokens.length ? "given" : "token"} ${count(token.index + 1)} of ${count(text.tokens.length)}`;
  const button = (sign, name, click) => element("button", { type: "button", "aria-label": name, title: name, on: { click } }, sign);
  const buttons = element("div", { class: "buttons" },
    button("\u2039", "Token before (arrow left)", () => state.step(-1)), button("\u203a", "Next token (arrow right)", () => state.step(1)),
    button("\u00d7", "Close (Escape)", () => state.choose(null)));
  return element("div", { class: "heading" },
    element("div", {}, element("h2", { tabindex: -1, id: "chosen" }, element("bdi", {}, visible(token.text, token.symbol))), element("p", { class: "hint" }, number, " \u00b7 ", element("code", {}, token.symbol))), buttons);
}

function probabilities(token) {
  const row = (name, logProb, kind) => [element("span", {}, name), bar(toProbability(logProb) ?? 0, kind), element("span", { class: "number" }, percent(toProbability(logProb)))];
  const kind = token.gain < 0 ? "lost" : "gained";
  return element("div", { class: "probabilities" },
    element("div", { class: "pair" }, row("without memory", token.lm, ""), row("with memory", token.mixture, kind)),
    element("p", { class: `bits ${kind}` }, signed(token.gain), element("small", {}, " bits")));
}

function experts(token) {
  if (!token.voices.length) return null;
  const cell = (length, kind, words) => element("td", {}, bar(length, kind), element("span", { class: "number" }, words));
  const most = Math.max(1, ...token.voices.map((voice) => Math.abs(voice.bits)));
  const rows = token.voices.map((voice, first) => element("tr", {},
    element("th", { scope: "row" }, first === 0 ? "language model" : voice.name),
    cell(voice.weight, "", percent(voice.weight)),
    cell(toProbability(voice.log_prob) ?? 0, "", percent(toProbability(voice.log_prob))),
    first === 0 ? element("td") : cell(Math.abs(voice.bits) / most, voice.bits < 0 ? "lost" : "gained", signed(voice.bits))));
  const head = ["Expert", "Weight", "Own probability", "Bits moved"].map((name) => element("th", { scope: "col" }, name));
  return part("Experts", element("table", { class: "experts" }, element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows)));
}

function alternatives(token) {
  if (!token.lm_guesses.length && !token.mixture_guesses.length) return null;
  const most = Math.max(...[...token.lm_guesses, ...token.mixture_guesses].map((guess) => guess.probability), 1e-9);
  const list = (title, guesses) => element("div", {}, element("h4", {}, title), element("ol", {}, guesses.map((guess) => {
    const came = guess.text === token.text;
    return element("li", { class: came ? "came" : false, title: came ? "this one came" : false },
      element("bdi", {}, visible(guess.text)), bar(guess.probability / most), element("span", { class: "number" }, percent(guess.probability)));
  })));
  return part("Likeliest tokens", element("div", { class: "guesses" }, list("without memory", token.lm_guesses), list("with memory", token.mixture_guesses)));
}

function agreement(state, token) {
  const known = token.agreement.map((share, at) => [share, state.record.run.memories[at]]).filter(([share]) => share !== null);
  if (!known.length) return null;
  const rows = known.map(([share, memory]) => [element("span", {}, known.length > 1 && memory ? `neighbours of ${memory.name} agree` : "neighbours agree"), bar(share), element("span", { class: "number" }, percent(share))]);
  return element("div", { class: "pair agreement", title: "the part of the neighbours\u2019 probability that their likeliest token has" }, rows);
}

function sources(state, token) {
  if (!token.sources.length) return part("Sources", element("p", { class: "hint" }, "No entry of a datastore spoke for this token or another one."), agreement(state, token));
  const { query, scope } = state.filter;
  const found = query && scope !== "text" ? token.sources.filter((source) => sourceHas(source, query)) : [];
  const shown = found.length && !state.allSources ? found : token.sources;
  const rest = token.sources.length - shown.length;
  const list = element("ol", { class: "sources" }, shown.map((source) => sourceCard(state, token, source)));
  const more = rest > 0 && element("button", { type: "button", class: "more", on: { click: state.showAllSources } }, `Show ${plural(rest, "source")} without the words searched for`);
  const hint = element("p", { class: "hint" }, "By their share of the neighbours\u2019 probability. ", element("mark", {}, "Marked"), " is what stands before this token too.");
  return part("Sources", agreement(state, token), list, hint, more);
}

// Where nothing is chosen: how to read, and tokens to begin with.
function whereToBegin(state) {
  const top = (order) => chosenTokens(state.text, { query: "", scope: "all", kind: order, order, expert: state.filter.expert }).slice(0, 6);
  const list = (title, tokens) => tokens.length > 0 && part(title, element("ul", { class: "starts" }, tokens.map((token) => {
    const bits = bitsOf(token, state.filter.expert);
    return element("li", {}, element("button", { type: "button", on: { click: () => state.goTo(state.text, token) } },
      element("span", { class: "around" }, around(state.text, token, 22)), element("span", { class: `number ${bits < 0 ? "lost" : "gained"}` }, signed(bits))));
  })));
  const keys = [["\u2190 \u2192", "the token before, the next one"], ["Enter", "on to what is known of it"], ["/", "search"], ["Esc", "close"]];
  return [
    element("div", { class: "intro" }, element("h2", {}, "Choose a token"),
      element("p", {}, "Its colour says by how many bits the memory made it likelier or less likely. Chosen, it shows who said so, what else might have come, and the sources."),
      element("dl", { class: "keys" }, keys.map(([key, words]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, words)]))),
    list("Gained most", top("gain")), list("Lost most", top("loss")),
  ].filter(Boolean);
}

// What is shown now, and what keys and the mouse change of it.

const record = await openRecord(byId("record"));
const form = byId("controls").elements;

const state = {
  record,
  text: record.texts[0],
  token: null,
  source: null,
  shown: [], // tokens, in the order in which the arrows walk
  most: SHOWN,
  filter: { query: "", scope: "all", kind: "all", order: "text", expert: "" },

  choose(token, focus = true) {
    const before = state.token;
    state.token = token;
    state.allSources = false;
    state.chooseSource(null);
    drawDetails(state);
    for (const node of document.querySelectorAll("[aria-selected=true]")) node.setAttribute("aria-selected", "false");
    const node = drawn(token);
    node?.setAttribute("aria-selected", "true");
    if (token) stand(node, focus);
    else if (before) stand(drawn(before), focus);
  },

  step(by) {
    const at = state.shown.indexOf(state.token);
    const next = state.shown[at + by];
    if (!next) return;
    state.choose(next, false);
    drawn(next)?.scrollIntoView({ block: "nearest" });
  },

  // Chosen again, it is closed.
  chooseSource(source) {
    state.source = source === state.source ? null : source;
    for (const card of document.querySelectorAll(".source.open")) {
      card.classList.remove("open");
      card.querySelector("button").setAttribute("aria-expanded", "false");
      card.querySelector(".helped").remove();
    }
    markHelped(state, state.source);
    if (!state.source) return;
    const card = cardOf(state.source);
    card.classList.add("open");
    card.querySelector("button").setAttribute("aria-expanded", "true");
    card.append(helpedLists(state, state.source));
  },

  showSource(source) {
    if (!cardOf(source)) state.showAllSources();
    if (state.source !== source) state.chooseSource(source);
    cardOf(source).querySelector("button").focus();
  },

  showAllSources() {
    state.allSources = true;
    drawDetails(state);
  },

  goTo(text, token) {
    if (text !== state.text) showText(text);
    if (!drawn(token)) {
      for (const [name, value] of Object.entries({ query: "", kind: "all", order: "text" })) form[name].value = value;
      readFilter();
    }
    state.choose(token);
    drawn(token).scrollIntoView({ block: "nearest" });
  },
};

const view = () => byId(state.filter.order === "text" ? "text" : "ranking");
const drawn = (token) => token && view().querySelector(`[data-index="${token.index}"]`);
const cardOf = (source) => document.querySelector(`.source[data-memory="${source.memory}"][data-row="${source.row}"]`);

// One token of the view can be reached with Tab; arrows walk from there.
function stand(node, focus = false) {
  if (!node) return;
  for (const other of view().querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  node.tabIndex = 0;
  if (focus) node.focus();
}

function showText(text) {
  state.text = text;
  state.token = state.source = null;
  form.text.value = text.number;
  document.title = `${text.name} \u00b7 where each word came from`;
  drawLegend(text);
  draw();
  drawDetails(state);
}

// Draws the view by the filter.
function draw() {
  const { text, filter } = state;
  state.shown = chosenTokens(text, filter);
  const inOrder = filter.order === "text";
  byId("text").hidden = !inOrder;
  byId("ranking").hidden = inOrder;
  drawText(text, filter.expert);
  if (inOrder) {
    byId("more").hidden = true;
    const shown = new Set(state.shown);
    byId("text").classList.toggle("filtered", shown.size < text.tokens.length);
    for (const token of text.tokens) if (shown.has(token)) token.drawn.classList.add("fits");
  } else drawRanking(text, state.shown, filter.expert, state.most);
  const some = state.shown.length < text.tokens.length;
  byId("count").textContent = some ? `${count(state.shown.length)} of ${plural(text.tokens.length, "token")}` : plural(text.tokens.length, "token");
  stand(drawn(state.token) ?? drawn(state.shown[0]));
  drawn(state.token)?.setAttribute("aria-selected", "true");
  markHelped(state, state.source);
}

function readFilter() {
  for (const name of Object.keys(state.filter)) state.filter[name] = form[name].value;
  state.filter.query = state.filter.query.trim().toLowerCase();
  state.most = SHOWN;
  draw();
  const { source } = state;
  drawDetails(state);
  if (source && cardOf(source)) { state.source = null; state.chooseSource(source); }
}

function walk(event) {
  const at = state.shown.findIndex((token) => String(token.index) === event.target.dataset.index);
  const forward = getComputedStyle(view()).direction === "rtl" ? -1 : 1;
  const steps = { ArrowRight: forward, ArrowLeft: -forward, Home: -Infinity, End: Infinity };
  if (state.filter.order !== "text") Object.assign(steps, { ArrowDown: 1, ArrowUp: -1 });
  const last = Math.min(state.shown.length, state.filter.order === "text" ? Infinity : state.most) - 1;
  if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    const to = Math.min(last, Math.max(0, (at < 0 ? 0 : at) + steps[event.key]));
    if (state.shown[to]) state.choose(state.shown[to]);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    state.choose(state.text.tokens[event.target.dataset.index]);
    if (event.key === "Enter") byId("chosen").focus();
  }
}

function listen() {
  for (const id of ["text", "ranking"]) {
    byId(id).addEventListener("click", (event) => {
      const node = event.target.closest("[data-index]");
      if (node) state.choose(state.text.tokens[node.dataset.index]);
    });
    byId(id).addEventListener("keydown", (event) => { if (event.target.dataset.index) walk(event); });
  }
  byId("text").addEventListener("pointerover", ({ target }) => {
    const token = state.text.tokens[target.dataset?.index];
    if (token) target.title = `${signed(bitsOf(token, state.filter.expert))} bits`;
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", (event) => (event.target.name === "text" ? showText(record.texts[event.target.value]) : readFilter()));
  byId("more").addEventListener("click", () => { state.most += SHOWN; draw(); });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select");
    if (event.key === "/" && !typing) { event.preventDefault(); form.query.focus(); form.query.select(); }
    if (event.key === "Escape" && !typing) { if (state.source) state.chooseSource(null); else if (state.token) state.choose(null); }
  });
}

function begin() {
  drawFigures(record);
  for (const text of record.texts) {
    const average = averages([text]);
    const how = average ? ` \u00b7 ${signed(average.gain, 2)} bits a token` : "";
    form.text.append(element("option", { value: text.number }, text.name + how));
  }
  byId("which").hidden = record.texts.length < 2;
  if (record.leftOut) byId("which").after(element("p", { class: "hint" }, `${plural(record.leftOut, "more text")} did not fit on this page.`));
  const experts = expertsOf(record.texts);
  form.expert.append(...experts.map((name) => element("option", { value: name }, name)));
  listen();
  showText(record.texts[0]);
  performance.mark("ready");
  document.documentElement.dataset.ready = "";
}

begin();

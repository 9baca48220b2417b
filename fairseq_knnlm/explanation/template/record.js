// The record: gzip in base64; its first line is the run, each further one a text.

async function openRecord(holder) {
  const letters = atob(holder.textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const lines = (await new Response(stream).text()).split("\n").filter(Boolean);
  const [run, ...texts] = lines.map((line) => JSON.parse(line));
  texts.forEach(prepare);
  return { run, texts, leftOut: Number(holder.dataset.leftOut) };
}

const toBits = (logProb) => -logProb / Math.LN2;
const toProbability = (logProb) => (logProb === null ? null : Math.min(1, Math.exp(logProb)));

// What follows from a text: the whole of it, where each token begins, and the bits gained.
function prepare(text, number) {
  text.number = number;
  let at = 0;
  text.tokens.forEach((token, index) => {
    token.index = index;
    token.start = at;
    token.given = index < text.given;
    token.gain = gained(token);
    at += token.text.length;
  });
  text.whole = text.tokens.map((token) => token.text).join("");
}

function gained(token) {
  if (token.lm === null) return token.mixture === null ? null : Infinity;
  return token.mixture === null ? -Infinity : (token.mixture - token.lm) / Math.LN2;
}

// Bits that one expert moved a token by, or all of them.
function bitsOf(token, expert) {
  if (!expert) return token.gain;
  const voice = token.voices.find((each) => each.name === expert);
  return voice ? voice.bits : null;
}

// All experts but the language model, which is the first of a token's.
function expertsOf(texts) {
  const names = new Set();
  for (const text of texts) for (const token of text.tokens) for (const voice of token.voices.slice(1)) names.add(voice.name);
  return [...names];
}

// Written tokens, where there are any: what was given was not predicted for anybody.
const counted = (text) => text.tokens.filter((token) => (!token.given || text.given >= text.tokens.length) && token.lm !== null && token.mixture !== null);

function averages(texts) {
  const tokens = texts.flatMap(counted);
  const mean = (name) => tokens.reduce((sum, token) => sum + toBits(token[name]), 0) / tokens.length;
  if (!tokens.length) return null;
  const [before, after] = [mean("lm"), mean("mixture")];
  return { tokens: tokens.length, before: 2 ** before, after: 2 ** after, gain: before - after };
}

// Which characters of a text, at the end of what stands before a source, stood before the token too.
function matchedLength(text, token, source) {
  if (!source.matched || !source.before) return 0;
  const first = text.tokens[Math.max(0, token.index - source.matched)];
  const here = text.whole.slice(first.start, token.start);
  let same = 0;
  while (same < here.length && same < source.before.length && here.at(-1 - same) === source.before.at(-1 - same)) same++;
  return same;
}

// Tokens that each entry and each document spoke for, in all texts.
function whomTheyHelped(texts) {
  const entries = new Map(), documents = new Map();
  const add = (map, key, found) => (map.has(key) ? map.get(key).push(found) : map.set(key, [found]));
  for (const text of texts)
    for (const token of text.tokens)
      for (const source of token.sources) {
        if (!source.agrees) continue;
        add(entries, entryKey(source), { text, token, source });
        if (documentKey(source)) add(documents, documentKey(source), { text, token, source });
      }
  return { entries, documents };
}

const entryKey = (source) => `${source.memory} ${source.row}`;
const documentKey = (source) => (source.document_row === null ? null : `${source.memory} ${source.document_row}`);

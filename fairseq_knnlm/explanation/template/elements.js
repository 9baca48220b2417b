// Elements are made of data here and nowhere else. Strings become text, never markup.

const SVG = "http://www.w3.org/2000/svg";

function make(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "part") node.style.setProperty("--part", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

const element = (tag, properties = {}, ...children) => make(document.createElement(tag), properties, children);
const shape = (tag, properties = {}, ...children) => make(document.createElementNS(SVG, tag), properties, children);
const byId = (id) => document.getElementById(id);

// Numbers, as they are read.

const MINUS = "\u2212";

const signed = (x, digits = 1) => {
  if (x === null) return "\u2013";
  if (!Number.isFinite(x)) return x > 0 ? "+\u221e" : `${MINUS}\u221e`;
  const text = Math.abs(x).toFixed(digits);
  return Number(text) === 0 ? text : (x < 0 ? MINUS : "+") + text;
};

const percent = (p) => {
  if (p === null) return "\u2013";
  if (p === 0) return "0%";
  if (p < 0.0001) return "<0.01%";
  const x = 100 * p;
  return `${x >= 99.95 ? "100" : x >= 9.95 ? x.toFixed(x >= 99 ? 1 : 0) : Number(x.toPrecision(2))}%`;
};

const count = (n) => n.toLocaleString("en");
const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
const capital = (text) => text[0].toUpperCase() + text.slice(1);

// A token that is nothing but space is shown by a sign.
const visible = (text, symbol = "") => (text.trim() ? text.trim() : text.includes("\n") ? "\u21b5" : text ? "\u2423" : symbol || "\u2205");

// A length from 0 to 1.
const bar = (part, kind = "") => element("span", { class: `bar ${kind}`, part: Math.min(1, Math.max(0, part)), "aria-hidden": "true" });

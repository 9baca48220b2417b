// Query and neighbours, by their two principal components.

const WIDTH = 340, HEIGHT = 240, MARGIN = 22;

function drawPicture(token, toSource) {
  const placed = token.sources.filter((source) => source.place);
  if (!token.place || !placed.length) return element("p", { class: "hint" }, "There is no picture of this token: its keys were not looked at.");
  const at = scaled([token.place, ...placed.map((source) => source.place)]);
  const most = Math.max(...placed.map((source) => source.share), 1e-9);
  const tooltip = element("p", { class: "tooltip", role: "status" });
  const dots = placed.map((source) => {
    const [x, y] = at(source.place);
    const says = `${visible(source.value)}: share ${percent(source.share)}, distance ${source.distance.toPrecision(4)}`;
    const tell = () => { tooltip.textContent = says; };
    const quiet = () => { tooltip.textContent = TELL; };
    return shape("circle", {
      class: source.agrees ? "agrees" : "differs", cx: x, cy: y, r: 4 + 10 * Math.sqrt(source.share / most),
      tabindex: 0, role: "button", "aria-label": says, "data-row": source.row,
      on: { pointerenter: tell, focus: tell, pointerleave: quiet, blur: quiet, click: () => toSource(source),
        keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toSource(source); } } },
    }, shape("title", {}, says));
  });
  const TELL = "Larger: a larger share. Point at one.";
  tooltip.textContent = TELL;
  const [x, y] = at(token.place);
  const query = shape("path", { class: "query", d: `M${x} ${y - 8}L${x + 8} ${y}L${x} ${y + 8}L${x - 8} ${y}Z` }, shape("title", {}, "the query"));
  const picture = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "The query and its neighbours" }, [...dots].reverse(), query);
  const key = [["query", "query"], ["agrees", "the same token"], ["differs", "another one"]];
  const legend = element("p", { class: "dots" }, key.map(([kind, words]) => element("span", { class: `dot ${kind}` }, words)));
  return element("div", { class: "picture" }, picture, legend, tooltip);
}

// One scale for both axes, so that near is near.
function scaled(places) {
  const range = (axis) => { const all = places.map((place) => place[axis]); return [Math.min(...all), Math.max(...all)]; };
  const [[left, right], [low, high]] = [range(0), range(1)];
  const scale = Math.min((WIDTH - 2 * MARGIN) / (right - left || 1), (HEIGHT - 2 * MARGIN) / (high - low || 1));
  return ([x, y]) => [WIDTH / 2 + scale * (x - (left + right) / 2), HEIGHT / 2 - scale * (y - (low + high) / 2)];
}

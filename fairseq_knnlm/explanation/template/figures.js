// The run's figures, at the top of the page.

function figure(name, ...values) {
  return element("div", { class: "figure" }, element("dt", {}, name), element("dd", {}, ...values));
}

function drawFigures(record) {
  const average = averages(record.texts);
  const place = byId("figures");
  if (average) {
    const change = element("span", { class: average.gain < 0 ? "lost" : "gained" }, signed(average.gain, 2));
    place.append(
      figure("Perplexity without memory", average.before.toFixed(1)),
      figure("Perplexity with memory", element("strong", {}, average.after.toFixed(1))),
      figure("Bits gained a token", change),
      figure("Tokens", count(average.tokens)),
    );
  }
  for (const memory of record.run.memories)
    place.append(figure(`Datastore of ${memory.expert}`, memory.name, element("small", {}, plural(memory.rows, "entry", "entries"))));
  byId("run").append(aboutTheRun(record.run));
}

function aboutTheRun(run) {
  const rows = [["Mixture", run.mixture]];
  for (const memory of run.memories) rows.push([`Index of ${memory.name}`, memory.index], [`Fingerprint of ${memory.name}`, memory.fingerprint]);
  rows.push(["Language model", run.model]);
  rows.push(["Versions", Object.entries(run.versions).map((pair) => pair.join(" ")).join(", ")]);
  return element("dl", {}, rows.filter(([, value]) => value).map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

// What the colours mean, from lost to gained.
function drawLegend(text) {
  const steps = [...STEPS].reverse().map((step, at) => ["loss", STEPS.length - at, step]);
  const all = [...steps, ["", 0, 0], ...STEPS.map((step, at) => ["gain", at + 1, step])];
  const swatches = all.map(([kind, level, step]) =>
    element("span", { class: `swatch ${kind && `${kind}${level}`}`, title: kind ? `${kind === "gain" ? "gained" : "lost"} ${step} bits or more` : `moved by less than ${STEPS[0]} bits` }),
  );
  const given = text.given > 0 && text.given < text.tokens.length;
  byId("legend").replaceChildren(
    element("span", {}, "lost"), element("span", { class: "scale" }, swatches), element("span", {}, "gained"),
    element("span", { class: "unit" }, `${STEPS.join(" \u00b7 ")} bits`),
    given && element("span", { class: "key" }, element("span", { class: "given" }, "given"), " and ", element("span", { class: "written" }, "written")) || "",
  );
}

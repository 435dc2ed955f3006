// What is beside the answer: a token, what the run has cost, the colours.

// An element with text, attributes and children. Text is never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// A token's text on one line, spaces and line breaks visible.
function quoted(trace, id) {
  const text = trace.textOf(id);
  if (text === "") return `⟨${id}⟩`;
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\ufffd/g, "▯");
}

function percent(share) {
  if (share >= 0.9995) return share < 1 ? "> 99.9 %" : "100 %";
  return share < 0.0001 ? "< 0.01 %" : `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;
}

function definitions(pairs) {
  return make("dl", {}, ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

// One line: what a screen reader says of a token, and what stands under the slider.
function brief(trace, position) {
  const write = trace.write(position), block = trace.blockOf(position) + 1;
  if (write === null) return `Position ${position}, block ${block}: still a mask`;
  const edited = write.kind === "edit" ? `, in place of ${quoted(trace, write.old)}` : "";
  return `${quoted(trace, write.token)}${edited}: ${percent(write.confidence)}, step ${write.step + 1}, block ${block}`;
}

function showToken(root, trace, position) {
  if (position === null) {
    root.replaceChildren(make("p", { class: "muted" }, "Point at a token, tap it, or move to it with Tab and the arrow keys."));
    return;
  }
  const write = trace.write(position), number = trace.blockOf(position), block = trace.blocks[number];
  const parts = [make("p", { class: write ? "quote" : "quote empty" }, write ? quoted(trace, write.token) : "mask")];
  const facts = [["Position", String(position)], ["Block", `${number + 1} of ${trace.blocks.length}`]];
  if (write) {
    const when = write.step < block.last ? `${write.step - block.first + 1} of its block` : `of block ${trace.blockAt(write.step) + 1}`;
    facts.unshift(
      ["Id", String(write.token)],
      ["Confidence", make("span", { class: "with-bar" }, percent(write.confidence), meter(write.confidence))],
      ["Step", `${write.step + 1} (${when})`],
    );
  }
  parts.push(definitions(facts));
  if (position >= trace.end) parts.push(make("p", { class: "muted" }, "Behind the answer's end."));
  const told = (trace.doc.alternatives || [])[position];
  if (told && told.length && write === trace.writes[position][trace.writes[position].length - 1]) {
    parts.push(make("h3", {}, "Likeliest at that step"), alternatives(trace, told, write && write.token));
  }
  if (trace.writes[position].length) parts.push(make("h3", {}, "History"), history(trace, position));
  root.replaceChildren(...parts);
}

function meter(share) {
  return make("span", { class: "meter", "aria-hidden": "true" }, make("span", { style: { width: `${100 * share}%` } }));
}

function alternatives(trace, told, chosen) {
  return make("ol", { class: "alternatives" }, ...told.map(([id, logprob]) => {
    const probability = Math.exp(logprob), text = make("span", { class: "mono" }, quoted(trace, id));
    return make("li", id === chosen ? { class: "chosen" } : {}, text, make("span", {}, percent(probability)), meter(probability));
  }));
}

function history(trace, position) {
  const items = trace.writes[position].map((event, i) => {
    const mono = (id) => make("span", { class: "mono" }, quoted(trace, id));
    const what = event.kind === "edit" ? [mono(event.old), " → ", mono(event.token)]
      : [event.kind === "move" ? "moved here " : "written ", mono(event.token)];
    const happened = i < trace.applied[position];
    return make("li", { class: `${event.kind}${happened ? "" : " later"}` },
      make("span", { class: "muted" }, `step ${event.step + 1}`), make("span", {}, ...what), make("span", {}, percent(event.confidence)));
  });
  return make("ol", { class: "history" }, ...items);
}

const ENDS = { eos: "end token", length: "most tokens", cancelled: "being stopped", error: "an error" };

function showStatistics(root, trace) {
  const { statistics: cost, params, finish_reason: reason } = trace.doc, pairs = [];
  const number = (name, value, digits = 0) => {
    if (Number.isFinite(value)) pairs.push([name, value.toLocaleString("en", { maximumFractionDigits: digits })]);
  };
  number("Tokens", cost.tokens);
  number("Forwards", cost.denoise_forwards);
  number("Tokens per forward", cost.tokens_per_forward, 2);
  number("Edits", cost.edits);
  number("Blocks", cost.blocks);
  const seconds = (cost.prefill_s || 0) + (cost.decode_s || 0);
  if (seconds > 0) {
    pairs.push(["Time", seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`]);
    number("Tokens per second", cost.tokens / seconds);
  }
  if (reason) pairs.push(["Ended by", ENDS[reason] || reason]);
  const list = definitions(pairs);
  list.className = "figures";
  const chips = Object.entries(params).map(([name, value]) => {
    const plain = typeof value === "number" ? Number(value.toPrecision(4)) : Array.isArray(value) ? value.join(", ") : value;
    return make("li", {}, make("span", { class: "muted" }, `${name} `), String(plain));
  });
  root.replaceChildren(list, ...(chips.length ? [make("ul", { class: "chips", "aria-label": "Settings" }, ...chips)] : []));
}

function showLegend(root, by) {
  const ticks = by === "confidence" ? ["0", ...CONFIDENCES.map((x) => String(x).slice(1)), "1"] : null;
  const ramp = make("span", { class: "ramp", "aria-hidden": "true" });
  for (let i = 0; i < 8; i++) ramp.append(make("span", { class: `${by}-${i}` }));
  const ends = by === "confidence" ? ["confidence 0", "1"] : ["first step of the block", "last"];
  const scale = make("span", { class: "scale", title: ticks ? `changes at ${ticks.slice(1, -1).join(", ")}` : "" }, ends[0], ramp, ends[1]);
  const key = (name, text) => make("span", { class: "key" }, make("span", { class: `sample ${name}`, "aria-hidden": "true" }), text);
  root.replaceChildren(scale, key("now", "this step"), key("edited", "edited"), key("mask", "mask"));
}

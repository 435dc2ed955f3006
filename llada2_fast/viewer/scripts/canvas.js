// The tokens of an answer: one span each, made once. Only spans whose token changes are touched again.
const CONFIDENCES = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]; // where the colours change
const WIDE = /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]/;

class Canvas {
  // onInspect(position or null): somebody looks at a token, or no longer.
  constructor(root, onInspect) {
    this.root = root;
    this.onInspect = onInspect;
    root.addEventListener("pointerover", (event) => {
      const position = this.positionOf(event.target);
      if (position !== null && event.pointerType !== "touch") this.onInspect(position);
    });
    root.addEventListener("pointerleave", () => this.onInspect(this.selected));
    root.addEventListener("focusin", (event) => this.select(this.positionOf(event.target)));
    root.addEventListener("click", (event) => {
      const position = this.positionOf(event.target);
      if (position !== null) this.focus(position);
    });
    root.addEventListener("keydown", (event) => this.key(event));
  }

  show(trace) {
    this.trace = trace;
    this.spans = [];
    this.around = []; // by position: the text nodes before and behind its span
    this.sections = [];
    this.ringed = [];
    this.selected = null;
    this.root.replaceChildren();
    this.grow();
  }

  // Spans for positions that have none yet.
  grow() {
    const { blocks } = this.trace;
    for (let i = Math.max(0, this.sections.length - 1); i < blocks.length; i++) {
      if (i === this.sections.length) {
        const section = document.createElement("span");
        section.className = "block";
        section.setAttribute("role", "group");
        section.setAttribute("aria-label", `Block ${i + 1}`);
        section.dataset.number = i + 1;
        this.root.append(section);
        this.sections.push(section);
      }
      const more = document.createDocumentFragment();
      while (this.spans.length < blocks[i].end) {
        const span = document.createElement("span");
        span.setAttribute("role", "option");
        span.setAttribute("aria-selected", "false");
        span.tabIndex = this.spans.length ? -1 : 0;
        span.dataset.at = this.spans.length;
        this.spans.push(span);
        more.append(span);
        this.render(this.spans.length - 1);
      }
      this.sections[i].append(more);
    }
  }

  // The trace has gone to another step, by which these positions have changed.
  update(positions) {
    const stale = new Set([...positions, ...this.ringed]);
    this.ringed = [];
    for (const position of stale) this.render(position);
    const active = this.trace.activeBlock;
    this.sections.forEach((section, i) => {
      section.classList.toggle("active", i === active);
      section.classList.toggle("future", this.trace.blocks[i].first >= this.trace.step);
    });
  }

  render(position) {
    const span = this.spans[position], trace = this.trace, write = trace.write(position), classes = ["t"];
    let label = null;
    if (write === null) {
      const text = trace.finalText(position);
      classes.push("mask");
      if (!text) classes.push("unknown");
      this.put(position, blank(text), "\u00a0");
      label = "mask";
    } else {
      const text = trace.textOf(write.token), empty = !text.trim();
      if (trace.special.has(write.token)) classes.push("special");
      if (empty && text.includes("\n")) classes.push("newline");
      if (write.kind === "edit") classes.push("edited");
      if (write.step === trace.step - 1) {
        classes.push("now");
        this.ringed.push(position);
      }
      this.put(position, visible(text, write.token), "");
      if (empty) label = named(text, write.token);
      span.dataset.c = confidenceLevel(write.confidence);
      span.dataset.s = stepLevel(trace.blocks[trace.blockOf(position)], write.step);
    }
    if (position >= trace.end) classes.push("beyond");
    if (position === this.selected) classes.push("selected");
    span.className = classes.join(" ");
    if (label === null) span.removeAttribute("aria-label");
    else span.setAttribute("aria-label", label);
  }

  // A token's text into its span, but for the space before it and the line break behind it: these stand beside the
  // span, or its colour would hang over the edges of lines. Of a token that is nothing else, `instead` stands inside.
  put(position, text, instead) {
    const [, before, inside, behind] = /^( *)([^]*?)(\n*)$/.exec(text), span = this.spans[position];
    const lone = inside === "" && behind === "";
    span.textContent = lone ? before : inside || instead;
    const around = lone ? ["", ""] : [before, behind];
    const nodes = this.around[position] || (this.around[position] = []);
    around.forEach((beside, i) => {
      if (nodes[i]) nodes[i].data = beside;
      else if (beside) {
        nodes[i] = document.createTextNode(beside);
        if (i) span.after(nodes[i]);
        else span.before(nodes[i]);
      }
    });
  }

  positionOf(element) {
    const span = element.closest ? element.closest("[data-at]") : null;
    return span ? Number(span.dataset.at) : null;
  }

  select(position) {
    if (position === null || position === this.selected) return;
    const old = this.spans[this.selected ?? 0], span = this.spans[position];
    old.tabIndex = -1;
    old.classList.remove("selected");
    old.setAttribute("aria-selected", "false");
    old.removeAttribute("aria-describedby");
    span.tabIndex = 0;
    span.classList.add("selected");
    span.setAttribute("aria-selected", "true");
    span.setAttribute("aria-describedby", "brief");
    this.selected = position;
    this.onInspect(position);
  }

  focus(position) {
    this.spans[Math.max(0, Math.min(this.spans.length - 1, position))].focus();
  }

  key(event) {
    const at = this.positionOf(event.target), { blocks } = this.trace;
    if (at === null || event.altKey || event.ctrlKey || event.metaKey) return;
    const block = this.trace.blockOf(at);
    const moves = {
      ArrowLeft: () => at - 1,
      ArrowRight: () => at + 1,
      ArrowUp: () => this.inLine(at, -1),
      ArrowDown: () => this.inLine(at, 1),
      Home: () => 0,
      End: () => this.spans.length - 1,
      PageUp: () => blocks[Math.max(0, block - 1)].begin,
      PageDown: () => blocks[Math.min(blocks.length - 1, block + 1)].begin,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation(); // the arrows of the page move between steps
    this.focus(moves[event.key]());
  }

  // The nearest token of the line above or below.
  inLine(at, way) {
    const from = this.spans[at], left = from.offsetLeft;
    let best = at, line = null;
    for (let i = at + way; i >= 0 && i < this.spans.length; i += way) {
      const span = this.spans[i], top = span.offsetTop;
      if (Math.abs(top - from.offsetTop) < 4) continue;
      if (line !== null && Math.abs(top - line) >= 4) break;
      if (line === null || Math.abs(span.offsetLeft - left) < Math.abs(this.spans[best].offsetLeft - left)) best = i;
      line = top;
    }
    return best;
  }
}

// As wide as the text, and broken into lines where it is, so that nothing moves when the token comes.
function blank(text) {
  return text ? text.replace(/[^\s]/gu, (character) => (WIDE.test(character) ? "\u3000" : "\u00a0")) : "\u00a0";
}

// Text of a token as a person can see it. Bytes that are no whole character by themselves come as U+FFFD.
function visible(text, id) {
  return text === "" ? `⟨${id}⟩` : text.replace(/\ufffd/g, "▯");
}

function named(text, id) {
  if (text === "") return `token ${id}`;
  return text.includes("\n") ? "line break" : text.includes("\t") ? "tab" : "space";
}

function confidenceLevel(confidence) {
  let level = 0;
  while (level < CONFIDENCES.length && confidence >= CONFIDENCES[level]) level++;
  return level;
}

// 0 for the first step of its block, 7 for the last.
function stepLevel(block, step) {
  const steps = block.last - block.first;
  return steps > 1 ? Math.min(7, Math.round((7 * (step - block.first)) / (steps - 1))) : 0;
}

// The steps of a run: slider, buttons, and a chart over them in which the bar of a step begins where the slider stands
// before it and ends where it stands behind it.
class Timeline {
  // onStep(step): somebody wants to see the answer after so many steps.
  constructor(onStep) {
    this.onStep = onStep;
    this.timer = null;
    const on = (id, act) => document.getElementById(id).addEventListener("click", () => this.move(act));
    on("back", () => this.trace.step - 1);
    on("forth", () => this.trace.step + 1);
    on("block-back", () => this.nearBlock(-1));
    on("block-forth", () => this.nearBlock(1));
    this.slider = document.getElementById("slider");
    this.slider.addEventListener("input", () => this.move(() => Number(this.slider.value)));
    this.block = document.getElementById("block");
    this.block.addEventListener("change", () => this.move(() => this.trace.blocks[Number(this.block.value)].last));
    this.playButton = document.getElementById("play");
    this.playButton.addEventListener("click", () => (this.timer === null ? this.play() : this.pause()));
    document.getElementById("speed").addEventListener("change", () => this.timer !== null && this.play());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  show(trace) {
    this.pause();
    this.trace = trace;
    this.slider.max = trace.numSteps;
    this.block.replaceChildren(...trace.blocks.map((_, i) => make("option", { value: i }, `Block ${i + 1} of ${trace.blocks.length}`)));
    drawChart(document.getElementById("chart"), trace);
    this.update();
  }

  // The trace has gone to another step.
  update() {
    const { step, numSteps, blocks } = this.trace, active = Math.max(0, this.trace.activeBlock);
    this.slider.value = step;
    this.slider.setAttribute("aria-valuetext", `step ${step} of ${numSteps}, block ${active + 1} of ${blocks.length}`);
    document.getElementById("where").textContent = `${step} / ${numSteps}`;
    this.block.value = active;
    const rest = document.getElementById("chart").querySelector(".rest");
    if (rest) {
      rest.setAttribute("x", step);
      rest.setAttribute("width", numSteps - step);
    }
  }

  move(where) {
    this.pause();
    this.onStep(where());
  }

  nearBlock(way) {
    const ends = [0, ...this.trace.blocks.map((block) => block.last)], { step } = this.trace;
    return way > 0 ? ends.find((end) => end > step) ?? step : ends.reverse().find((end) => end < step) ?? 0;
  }

  play() {
    this.pause();
    if (this.trace.step >= this.trace.numSteps) this.onStep(0);
    document.body.classList.add("playing");
    this.playButton.setAttribute("aria-label", "Pause");
    const rate = Number(document.getElementById("speed").value);
    this.timer = setInterval(() => {
      this.onStep(this.trace.step + 1);
      if (this.trace.step >= this.trace.numSteps) this.pause();
    }, 1000 / rate);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    document.body.classList.remove("playing");
    this.playButton.setAttribute("aria-label", "Play");
  }

  // Anywhere but in fields and on tokens, which have arrows of their own.
  key(event) {
    if (!this.trace || document.body.dataset.state === "running" || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target.closest("input, textarea, select, [role=option]")) return;
    if (event.key === "ArrowLeft") this.move(() => this.trace.step - 1);
    else if (event.key === "ArrowRight") this.move(() => this.trace.step + 1);
    else if (event.key === " " && !event.target.closest("button")) this.timer === null ? this.play() : this.pause();
    else return;
    event.preventDefault();
  }
}

function drawChart(svg, trace) {
  const steps = trace.numSteps, commits = new Array(steps).fill(0), edits = new Array(steps).fill(0);
  for (const event of trace.events) if (event.kind !== "move") (event.kind === "edit" ? edits : commits)[event.step]++;
  const highest = Math.max(1, ...commits.map((count, i) => count + edits[i]));
  const bars = (counts, from) => counts.map((count, i) =>
    count ? `M${i + 0.08} ${highest - from[i]}v${-count}h0.84v${count}z` : "").join("");
  const draw = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  svg.setAttribute("viewBox", `0 0 ${Math.max(1, steps)} ${highest}`);
  const mean = steps ? trace.events.filter((event) => event.kind === "commit").length / steps : 0;
  svg.setAttribute("aria-label", `Tokens written in each of ${steps} steps: ${mean.toFixed(1)} on average, ${highest} at most`);
  svg.replaceChildren(
    ...trace.blocks.filter((_, i) => i % 2).map((block) =>
      draw("rect", { class: "band", x: block.first, width: Math.max(0, block.last - block.first), y: 0, height: highest })),
    draw("path", { class: "commits", d: bars(commits, new Array(steps).fill(0)) }),
    draw("path", { class: "edits", d: bars(edits, commits) }),
    draw("rect", { class: "rest", x: 0, width: steps, y: 0, height: highest }),
  );
}

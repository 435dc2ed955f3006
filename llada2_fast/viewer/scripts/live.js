// The form of the live page, and the answer that is being written.
const PRESETS = { quality: [0.7, 0.5], speed: [0.5, 0] }; // of the server's modes: threshold, editing threshold
const STOP_MS = 3000; // so long may the server take to end what it was asked to stop

class Live {
  // view: {open(trace), grow(), done(trace), say(trouble)}. What was shown before stays until the server answers.
  constructor(view) {
    this.view = view;
    this.fields = {};
    for (const id of ["prompt", "mode", "max-tokens", "threshold", "edits", "editing-threshold", "temperature", "run", "stop", "progress"]) {
      this.fields[id] = document.getElementById(id);
    }
    const { prompt, mode, threshold, edits, run, stop } = this.fields, editing = this.fields["editing-threshold"];
    document.getElementById("ask").hidden = document.getElementById("intro").hidden = false;
    run.addEventListener("click", () => this.run());
    stop.addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.run();
    });
    for (const button of document.querySelectorAll("#examples button")) {
      button.addEventListener("click", () => {
        prompt.value = button.textContent;
        prompt.focus();
      });
    }
    mode.addEventListener("change", () => {
      if (!mode.value) return;
      [threshold.value, editing.value] = PRESETS[mode.value];
      edits.checked = true;
      editing.disabled = false;
    });
    for (const field of [threshold, edits, editing]) field.addEventListener("input", () => (mode.value = ""));
    edits.addEventListener("input", () => (editing.disabled = !edits.checked));
    editing.disabled = !edits.checked;
    document.getElementById("more").open = innerWidth > 600;
    this.greet();
  }

  // Whose page this is.
  async greet() {
    try {
      const { data } = await (await ask("v1/models")).json();
      this.model = data[0].id;
      document.getElementById("model").textContent = this.model;
      if (data[0].max_model_len) this.fields["max-tokens"].max = data[0].max_model_len;
    } catch (error) {
      this.fail(error);
    }
  }

  // The request as the form says; Trouble where it cannot be one.
  request() {
    const { prompt, mode, threshold, edits, temperature } = this.fields, editing = this.fields["editing-threshold"];
    if (!prompt.value.trim()) throw this.at(prompt, "Write a prompt first.");
    for (const field of [this.fields["max-tokens"], threshold, editing, temperature]) {
      const name = field.ariaLabel || field.labels[0].textContent;
      if (!field.disabled && !field.checkValidity()) throw this.at(field, `${name}: ${field.validationMessage}`);
    }
    const how = mode.value
      ? { mode: mode.value }
      : { threshold: Number(threshold.value), ...(edits.checked ? { editing_threshold: Number(editing.value) } : {}) };
    return {
      model: this.model, messages: [{ role: "user", content: prompt.value }], temperature: Number(temperature.value),
      max_completion_tokens: Number(this.fields["max-tokens"].value), ...how, stream: true, draft: true, trace: true,
    };
  }

  at(field, message) {
    if (field !== this.fields.prompt) document.getElementById("more").open = true;
    field.focus();
    return new Trouble(message);
  }

  async run() {
    if (this.abort) return;
    this.view.say("");
    try {
      const body = this.request(), { model, messages, stream, draft, trace, ...params } = body;
      this.abort = new AbortController();
      this.trace = Trace.live(model || "", messages[0].content, params);
      this.id = null;
      this.text = "";
      this.began = performance.now();
      this.state("running");
      const response = await ask("v1/chat/completions", posted(body, this.abort.signal));
      this.view.open(this.trace);
      for await (const chunk of events(response)) this.take(chunk);
    } catch (error) {
      this.fail(error);
    } finally {
      this.end();
    }
  }

  take(chunk) {
    this.id = this.id || chunk.id;
    const choice = (chunk.choices || [])[0];
    if (!choice) return;
    this.text += (choice.delta && choice.delta.content) || "";
    if (choice.trace) this.final = choice.trace;
    if (choice.finish_reason) this.reason = choice.finish_reason;
    const part = choice.commit || choice.draft;
    if (!part || !part.token_ids.length) return;
    this.trace.take(part);
    if (choice.commit) this.given = part.start + part.token_ids.length;
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    if (!this.abort) return;
    this.view.grow();
    const seconds = ((performance.now() - this.began) / 1000).toFixed(1);
    this.fields.progress.textContent = `block ${this.trace.blocks.length}, ${this.trace.numSteps} forwards, ${seconds} s`;
  }

  // Ask the server to end the answer where it stands: then its trace still comes. If it does not, hang up.
  async stop() {
    const abort = this.abort;
    if (!abort || this.fields.stop.disabled) return;
    this.fields.stop.disabled = true;
    this.reason = "cancelled";
    setTimeout(() => abort.abort(), this.id ? STOP_MS : 0);
    if (this.id) {
      try {
        await ask(`v1/requests/${encodeURIComponent(this.id)}/cancel`, { method: "POST" });
      } catch (error) {
        abort.abort();
      }
    }
  }

  end() {
    if (!this.abort) return;
    this.abort.abort();
    this.abort = null;
    cancelAnimationFrame(this.frame);
    const trace = this.final ? new Trace(this.final) : this.closed();
    this.final = this.reason = this.given = this.frame = null;
    this.fields.progress.textContent = "";
    this.state("done");
    this.view.done(trace);
  }

  // The trace as far as it was seen, where the server has sent none.
  closed() {
    const { trace } = this, { doc } = trace;
    doc.token_ids = [];
    for (let i = 0; i < (this.given || 0); i++) {
      const writes = trace.writes[i];
      doc.token_ids.push(writes.length ? writes[writes.length - 1].token : doc.mask_id);
    }
    const tokens = doc.token_ids.length, denoise_forwards = trace.numSteps;
    const lengths = trace.blocks.map((block) => block.end - block.begin);
    Object.assign(doc, {
      events: trace.events, text: this.text, finish_reason: this.reason || "error",
      block_length: Math.max(1, ...lengths), prompt_tokens: Math.max(1, ...lengths) - (lengths[0] || 0),
    });
    doc.statistics = {
      tokens, denoise_forwards, tokens_per_forward: tokens / Math.max(1, denoise_forwards),
      edits: trace.events.filter((event) => event.kind === "edit").length, blocks: lengths.length,
      forwards_per_block: trace.blocks.map((block, i) => Math.max(0, block.last - (i ? trace.blocks[i - 1].last : 0))),
      decode_s: (performance.now() - this.began) / 1000,
    };
    return new Trace(doc);
  }

  state(name) {
    document.body.dataset.state = name;
    this.fields.run.disabled = name === "running";
    this.fields.stop.disabled = name !== "running";
  }

  fail(error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Trouble)) console.error(error);
    this.view.say(error instanceof Trouble ? error.message : `Something went wrong in this page: ${error.message}`);
  }
}

"use strict";

// An answer that is being written, or was: its writes in order, and what stands where after so many steps.
class Trace {
  constructor(doc) {
    this.doc = doc;
    this.special = new Set(doc.special_ids);
    this.events = []; // in order of steps
    this.writes = []; // by position: its events
    this.applied = []; // by position: how many of them have happened by now
    this.cursor = 0; // how many of all events have
    this.step = 0; // how many steps have
    this.blocks = []; // {begin, end: positions; first, last: steps}, without their ends
    this.extend(doc.token_ids.length);
    for (const event of doc.events) this.add(event);
    if (doc.block_length) this.divide();
  }

  // One that nothing is known of yet; take() tells.
  static live(model, prompt, params) {
    return new Trace({
      format: "llada2_fast.trace", version: 1, model, prompt, prompt_tokens: 0, block_length: 0, mask_id: -1, text: "",
      finish_reason: null, token_ids: [], vocabulary: {}, special_ids: [], events: [], alternatives: null,
      statistics: {}, params,
    });
  }

  get length() { return this.writes.length; }

  get numSteps() {
    const last = this.events.length ? this.events[this.events.length - 1].step + 1 : 0;
    return Math.max(last, this.doc.statistics.denoise_forwards || 0);
  }

  // Positions from here on are behind the answer's end; nobody knows it while it is being written.
  get end() { return this.doc.finish_reason === null ? Infinity : this.doc.token_ids.length; }

  extend(length) {
    while (this.writes.length < length) {
      this.writes.push([]);
      this.applied.push(0);
    }
  }

  add(event) {
    this.extend(event.position + 1);
    this.events.push(event);
    this.writes[event.position].push(event);
  }

  // Blocks lie on a grid that begins with the prompt.
  divide() {
    const length = this.doc.block_length, forwards = this.doc.statistics.forwards_per_block || [];
    let begin = 0, first = 0;
    for (let i = 0; begin < this.length; i++) {
      const end = Math.min(this.length, begin + length - ((this.doc.prompt_tokens + begin) % length));
      const last = first + (forwards[i] || 0);
      this.blocks.push({ begin, end, first, last });
      [begin, first] = [end, last];
    }
  }

  blockOf(position) {
    let low = 0, high = this.blocks.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.blocks[middle].begin <= position) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  // The block that the last step was of.
  get activeBlock() { return this.step ? this.blockAt(this.step - 1) : -1; }

  // The block that a step was of, which may have edited earlier ones, too.
  blockAt(step) { return this.blocks.findIndex((block) => step >= block.first && step < block.last); }

  // What stands at a position by now, null for a mask, which may have been put back.
  write(position) {
    const applied = this.applied[position], write = applied ? this.writes[position][applied - 1] : null;
    return write && write.token !== this.doc.mask_id ? write : null;
  }

  textOf(id) { return this.doc.vocabulary[id] ?? ""; }

  // What stands there at the end, "" where that is not known.
  finalText(position) {
    const writes = this.writes[position];
    return writes.length ? this.textOf(writes[writes.length - 1].token) : "";
  }

  // Let exactly so many steps have happened. Returns the positions that may look otherwise now.
  go(step) {
    const touched = new Set();
    step = Math.max(0, Math.min(this.numSteps, step));
    while (this.cursor < this.events.length && this.events[this.cursor].step < step) {
      const position = this.events[this.cursor++].position;
      this.applied[position]++;
      touched.add(position);
    }
    while (this.cursor && this.events[this.cursor - 1].step >= step) {
      const position = this.events[--this.cursor].position;
      this.applied[position]--;
      touched.add(position);
    }
    this.step = step;
    return touched;
  }

  // A draft or a commit of the stream: {start, token_ids, tokens, confidences, steps}. A step of -1 is a mask.
  take(part) {
    const fresh = [], end = part.start + part.token_ids.length;
    this.extend(end);
    const last = this.blocks[this.blocks.length - 1], begin = last ? last.end : part.start;
    const seen = last ? last.last : 0, now = Math.max(seen, ...part.steps);
    if (end > begin) this.blocks.push({ begin, end, first: Infinity, last: 0 });
    part.steps.forEach((written, i) => {
      const position = part.start + i, writes = this.writes[position], before = writes[writes.length - 1];
      const masked = written < 0, token = masked ? this.doc.mask_id : part.token_ids[i];
      if (masked ? !before || before.written < 0 : before && before.written === written && before.token === token) return;
      if (!masked) {
        this.doc.vocabulary[token] = part.tokens[i];
        if (/^<\|.*\|>$/.test(part.tokens[i])) this.special.add(token); // the stream does not say which are
      }
      const moved = masked || written < seen; // what was written before the last part, or is taken back
      const kind = moved ? "move" : before && before.written >= 0 ? "edit" : "commit";
      fresh.push({
        step: moved ? now : written, written, position, kind, token, confidence: part.confidences[i],
        old: before ? before.token : this.doc.mask_id,
      });
    });
    fresh.sort((a, b) => a.step - b.step);
    for (const event of fresh) {
      this.add(event);
      const own = this.blocks[this.blockOf(event.position)];
      if (event.kind === "commit") own.first = Math.min(own.first, event.step);
      const block = this.blocks.filter((one) => one.first <= event.step).pop() || own;
      block.last = Math.max(block.last, event.step + 1);
    }
  }
}

// A trace file.
import assert from "node:assert/strict";

const texts = (page) => page.$$eval("#canvas [data-at]", (spans) => spans.map((span) => span.textContent));
const count = (page, selector) => page.$$eval(selector, (found) => found.length);

// The answer of an undertrained model, with edits: scrub, look at tokens, change colours.
export async function scrubbing(page, { check, shot }) {
  await check(page, "at the end");
  await shot(page, "trace");
  const steps = Number(await page.getAttribute("#slider", "max")), end = await texts(page);
  assert.ok(steps > 3 && (await count(page, "#canvas .edited")) > 0 && (await count(page, "#canvas .mask")) === 0);

  // arrows anywhere on the page: a step back, and back to the beginning, where all are masks
  await page.keyboard.press("ArrowLeft");
  assert.equal(await page.inputValue("#slider"), String(steps - 1));
  await page.focus("#slider");
  await page.keyboard.press("Home");
  assert.equal(await count(page, "#canvas .mask"), end.length);
  await page.keyboard.press("ArrowRight");
  const first = await count(page, "#canvas .mask");
  assert.ok(first < end.length && (await count(page, "#canvas .now")) === end.length - first);
  await check(page, "after a step");

  // buttons; blocks
  await page.click("#block-forth");
  const block = Number(await page.inputValue("#slider"));
  assert.ok(block > 1 && block < steps);
  await shot(page, "trace-half");
  await page.selectOption("#block", "0");
  assert.equal(await page.inputValue("#slider"), String(block));
  await page.click("#back");
  await page.click("#forth");
  assert.equal(await page.inputValue("#slider"), String(block));
  await page.selectOption("#speed", "50");
  await page.click("#play");
  await page.waitForFunction((n) => document.getElementById("slider").value === String(n), steps);
  await page.waitForSelector("#play[aria-label=Play]");
  assert.deepEqual(await texts(page), end);

  // details: by pointer, then by keyboard
  const edited = page.locator("#canvas .edited").first(), at = await edited.getAttribute("data-at");
  await edited.hover();
  for (const word of ["Confidence", "Likeliest at that step", "History", "→"]) {
    assert.ok((await page.textContent("#token")).includes(word), `the details of a token tell ${word}`);
  }
  await shot(page, "trace-edit");
  await edited.click();
  await check(page, "with a token chosen");
  assert.equal(await page.evaluate(() => document.activeElement.dataset.at), at);
  await page.keyboard.press("Home");
  for (let i = 0; i < 3; i++) await page.keyboard.press("ArrowRight");
  assert.equal(await page.evaluate(() => document.activeElement.dataset.at), "3");
  assert.equal(await page.inputValue("#slider"), String(steps), "arrows on tokens leave the step alone");
  assert.ok((await page.textContent("#token")).includes("Position3"));
  assert.equal(await count(page, '#canvas [tabindex="0"]'), 1);
  await page.keyboard.press("ArrowDown");
  const lower = await page.evaluate(() => Number(document.activeElement.dataset.at));
  assert.ok(lower > 3);
  await page.keyboard.press("End");
  assert.equal(await page.evaluate(() => Number(document.activeElement.dataset.at)), end.length - 1);

  await page.check("[name=colour][value=step]", { force: true });
  await check(page, "coloured by step");
  await shot(page, "trace-by-step");
}

// Two answers, the second of text that is markup.
export async function choosing(page, { check }) {
  const before = await texts(page);
  await page.selectOption("#choice", "1");
  assert.notDeepEqual(await texts(page), before);
  assert.equal(await page.textContent("#asked-text"), "</script><img src=x onerror=alert(1)><!--");
  assert.equal(await count(page, "img"), 0);
  await check(page, "the second answer");
}

// 2000 tokens: a step changes what it has to and nothing else.
export async function long(page) {
  const found = await page.evaluate(async () => {
    const slider = document.getElementById("slider"), canvas = document.getElementById("canvas"), times = [];
    const to = (step) => {
      slider.value = step;
      slider.dispatchEvent(new Event("input"));
    };
    const spans = [...canvas.querySelectorAll("[data-at]")];
    to(0);
    let changed = new Set();
    const observer = new MutationObserver((records) => {
      for (const { target } of records) {
        const span = (target.nodeType === 1 ? target : target.parentNode).closest("[data-at]");
        if (span) changed.add(span);
      }
    });
    observer.observe(canvas, { subtree: true, childList: true, attributes: true, characterData: true });
    let most = 0;
    for (let step = 1; step <= 100; step++) {
      const began = performance.now();
      to(step);
      canvas.getBoundingClientRect();
      times.push(performance.now() - began);
      await Promise.resolve();
      most = Math.max(most, changed.size);
      changed = new Set();
    }
    const same = [...canvas.querySelectorAll("[data-at]")].every((span, i) => span === spans[i]);
    return { tokens: spans.length, most, same, median: times.sort((a, b) => a - b)[50] };
  });
  console.log(JSON.stringify(found));
  assert.ok(found.tokens >= 2000 && found.same, "spans are made once");
  assert.ok(found.most > 0 && found.most <= 64, `a step touched ${found.most} tokens`);
  assert.ok(found.median < 100, `a step took ${found.median} ms`); // 10 on an idle core
}

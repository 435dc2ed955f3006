// The page of a server: /playground.
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";

const STORY = "Tell a story about Max the goat near the lake.";
const settings = async (page) => (await page.isVisible("#threshold")) || page.click("summary"); // closed where narrow
const done = (page) => page.waitForSelector("[data-state=done]");

export async function asking(page, { check, shot, faults }) {
  await page.waitForFunction(() => document.getElementById("model").textContent);
  await check(page, "before anything");
  await shot(page, "live-empty");
  await page.click("#run");
  assert.equal(await page.textContent("#alert"), "Write a prompt first.");
  await check(page, "with a mistake");

  await page.fill("#prompt", STORY);
  await settings(page);
  await page.fill("#threshold", "0.9");
  await page.keyboard.press("Control+Enter");
  await done(page);
  assert.equal(await page.textContent("#alert"), "");
  const said = await page.textContent("#said");
  assert.ok(said.startsWith("Once there was a goat named Max.") && said.endsWith("The end."));
  const shown = await page.$$eval("#canvas [data-at]:not(.special)", (spans) => spans.map((span) => span.textContent).join(""));
  assert.equal(shown, said.replaceAll(" ", ""));
  for (const word of ["Tokens per forward", "Tokens per second", "end token"]) {
    assert.ok((await page.textContent("#statistics")).includes(word));
  }
  await page.locator('#canvas [data-at="2"]').hover();
  assert.ok((await page.textContent("#token")).includes("Likeliest at that step"));
  await check(page, "with an answer");
  await shot(page, "live-done");

  // what is saved is a page by itself that shows the same
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
  const saved = await page.context().newPage();
  saved.on("pageerror", (error) => faults.push(error.stack));
  const file = `${await download.path()}.html`;
  writeFileSync(file, readFileSync(await download.path()));
  await saved.goto(`file://${file}`);
  assert.equal(await saved.textContent("#asked-text"), STORY);
  assert.equal(await saved.isVisible("#ask"), false);
  assert.equal(await saved.textContent("#canvas"), await page.textContent("#canvas"));
  await saved.close();

  // a mode is sent by its name
  await page.selectOption("#mode", "quality");
  assert.equal(await page.inputValue("#editing-threshold"), "0.5");
  const [request] = await Promise.all([page.waitForRequest("**/completions"), page.click("#run")]);
  const { mode, threshold, editing_threshold } = request.postDataJSON();
  assert.deepEqual([mode, threshold, editing_threshold], ["quality", undefined, undefined]);
  await page.waitForFunction(() => document.querySelectorAll("#choice option").length === 2);

  // what the server refuses is told in its words
  await page.fill("#max-tokens", "4096");
  await page.click("#run");
  await done(page);
  await page.waitForFunction(() => document.getElementById("alert").textContent);
  assert.match(await page.textContent("#alert"), /^The server did not take this\. It says: /);
  faults.splice(0); // the browser notes the status 400
  assert.equal(await page.textContent("#said"), said, "the answer before is still there");
  assert.ok((await page.textContent("#canvas")).includes("Once"));
  await check(page, "with an error of the server");
  await shot(page, "live-error");
  await page.context().setOffline(true);
  await page.click("#run");
  await page.waitForFunction(() => /cannot be reached/.test(document.getElementById("alert").textContent));
  faults.splice(0);
}

// A long answer, of a server without end tokens: masks and tokens are there while it is written; Stop ends it with what there is.
export async function stopping(page, { check, shot }) {
  await page.fill("#prompt", "a </script><b>bold</b> prompt");
  await settings(page);
  await page.fill("#threshold", "2"); // never reached: a token a step
  await page.fill("#max-tokens", "2000");
  await page.fill("#temperature", "1.5");
  await page.click("#run");
  await page.waitForFunction(() => document.querySelectorAll("#canvas .block").length > 4);
  await page.waitForFunction(() => document.querySelectorAll("#canvas .block:last-child .mask").length > 5);
  await shot(page, "live-half");
  assert.equal(await page.getAttribute("body", "data-state"), "running");
  assert.equal(await page.isDisabled("#run"), true);
  assert.match(await page.textContent("#progress"), /^block \d+, \d+ forwards, [\d.]+ s$/);
  assert.equal(await page.textContent("#said"), "");
  await page.click("#stop");
  await done(page);
  assert.equal(await page.textContent("#alert"), "");
  assert.ok((await page.textContent("#statistics")).includes("being stopped"));
  const tokens = await page.$$eval("#canvas [data-at]:not(.beyond)", (spans) => spans.length);
  assert.ok(tokens > 32 && tokens < 2000);
  await page.focus("#slider");
  await page.keyboard.press("Home");
  await page.keyboard.press("ArrowRight");
  assert.equal(await page.$$eval("#canvas [data-at]:not(.mask)", (spans) => spans.length), 1);
  await check(page, "after a stop");
}

// The server, of a model that edits much, dies in the middle: it is said, and what was seen until then can be looked at.
export async function losing(page, { check, faults }) {
  await page.fill("#prompt", STORY);
  await page.fill("#threshold", "0.3");
  await page.check("#edits");
  await page.fill("#editing-threshold", "0");
  await page.fill("#max-tokens", "2000");
  await page.fill("#temperature", "2");
  await page.click("#run");
  await page.waitForFunction(() => document.querySelectorAll("#canvas .block").length > 4 && document.querySelector("#canvas .edited"));
  const sizes = () => page.$$eval("#canvas .block", (blocks) => blocks.map((block) => block.querySelectorAll("[data-at]").length));
  const begun = (await sizes()).slice(0, 4);
  process.kill(Number(process.env.SERVER), "SIGKILL");
  await done(page);
  assert.equal(await page.textContent("#alert"), "The connection to the server broke off before the answer was complete.");
  faults.splice(0); // the browser notes the connection
  const end = await page.textContent("#canvas"), steps = Number(await page.getAttribute("#slider", "max"));
  assert.ok((await page.textContent("#said")).length > 50 && steps > 8);
  await page.focus("#slider");
  await page.keyboard.press("Home");
  assert.equal(await page.$$eval("#canvas [data-at]:not(.mask)", (spans) => spans.length), 0);
  await page.keyboard.press("End");
  assert.equal(await page.textContent("#canvas"), end);
  assert.deepEqual((await sizes()).slice(0, 4), begun, "the blocks are those there were");
  await page.locator("#canvas .edited").first().hover();
  const [written, old] = await page.$$eval("#token .history .mono", (spans) => spans.map((span) => span.textContent));
  assert.equal(old, written, "an edit replaces what was written before");
  await check(page, "after the loss");
}

// A page in Chromium, for the scenarios of trace.mjs and live.mjs: node browser.mjs SCENARIO ADDRESS SCHEME WIDTH
// NODE_MODULES: where playwright-core and axe-core are. CHROMIUM: the browser. SHOTS: a folder for pictures, if any.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { mkdirSync, readFileSync } from "node:fs";
import * as live from "./live.mjs";
import * as trace from "./trace.mjs";

const require = createRequire(`${process.env.NODE_MODULES}/`);
const { chromium } = require("playwright-core");
const AXE = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const [scenario, address, scheme, width] = process.argv.slice(2);

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
try {
  const context = await browser.newContext({
    colorScheme: scheme, viewport: { width: Number(width), height: 860 }, acceptDownloads: true,
  });
  const page = await context.newPage(), faults = [];
  page.on("pageerror", (error) => faults.push(error.stack));
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  page.on("dialog", (dialog) => faults.push(`dialog: ${dialog.message()}`));
  page.setDefaultTimeout(60000);
  await page.goto(address);
  await { ...trace, ...live }[scenario](page, { check, shot, browser, faults });
  assert.deepEqual(faults, [], "what the browser complained of");
} finally {
  await browser.close();
}

// Nothing sticks out, and axe finds nothing serious. It is run in an isolated world, which the page's policy allows.
async function check(page, what) {
  await page.waitForTimeout(400); // colours fade in
  const [needed, there] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(needed <= there, `${what}: ${needed} pixels wide in a window of ${there}`);
  await page.evaluate(AXE);
  const { violations, passes } = await page.evaluate(() => axe.run());
  assert.ok(passes.length > 10, "axe has looked at something");
  const bad = violations.filter((one) => ["serious", "critical"].includes(one.impact));
  assert.deepEqual(bad.map((one) => `${one.id}: ${one.nodes.slice(0, 3).map((node) => node.html).join(" ")}`), [], what);
}

async function shot(page, name) {
  if (!process.env.SHOTS) return;
  mkdirSync(process.env.SHOTS, { recursive: true });
  await page.screenshot({ path: `${process.env.SHOTS}/${name}-${scheme}-${width}.png` });
}

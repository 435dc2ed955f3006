// Everything together. With documents the page shows them; without any it is the server's live page.
const pristine = document.documentElement.cloneNode(true); // what a saved trace is made of
const documents = JSON.parse(document.getElementById("documents").textContent) || [];
const shown = { trace: null, inspected: null };
const $ = (id) => document.getElementById(id);

const canvas = new Canvas($("canvas"), inspect);
const timeline = new Timeline((step) => {
  $("canvas").classList.add("moved"); // from now on what the last step has written is marked
  goTo(step);
});

function inspect(position) {
  shown.inspected = position;
  showToken($("token"), shown.trace, position);
  $("brief").textContent = position === null ? "" : brief(shown.trace, position);
}

function goTo(step) {
  canvas.update(shown.trace.go(step));
  timeline.update();
  inspect(shown.inspected);
}

function open(trace) {
  shown.trace = trace;
  $("view").hidden = false;
  $("asked").hidden = !trace.doc.prompt || trace.doc.prompt === $("prompt").value; // then the form shows it
  $("asked-text").textContent = trace.doc.prompt || "";
  canvas.show(trace);
  timeline.show(trace);
  showStatistics($("statistics"), trace);
  inspect(null);
}

// A finished answer, as it is at its end.
function present(trace) {
  document.body.dataset.state = "done";
  open(trace);
  $("canvas").classList.remove("moved");
  goTo(trace.numSteps);
}

function choose(index) {
  const doc = documents[index];
  $("model").textContent = doc.model || "";
  present(new Trace(doc));
  $("choice").value = index;
}

function listDocuments() {
  $("chooser").hidden = documents.length < 2;
  $("choice").replaceChildren(...documents.map((doc, i) => make("option", { value: i }, `${i + 1}: ${(doc.prompt || doc.text).slice(0, 60)}`)));
}

function colourBy(by) {
  $("canvas").classList.toggle("by-confidence", by === "confidence");
  $("canvas").classList.toggle("by-step", by === "step");
  showLegend($("legend"), by);
}

// JSON that can stand in a <script>.
function embedded(value) {
  return JSON.stringify(value).replace(/[<>&\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function save() {
  const root = pristine.cloneNode(true);
  root.querySelector("#documents").textContent = embedded([shown.trace.doc]);
  const url = URL.createObjectURL(new Blob(["<!doctype html>\n", root.outerHTML, "\n"], { type: "text/html" }));
  const words = (shown.trace.doc.prompt || "").toLowerCase().match(/[a-z0-9]+/g) || ["answer"];
  make("a", { href: url, download: `trace-${words.slice(0, 6).join("-")}.html` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

$("choice").addEventListener("change", () => choose(Number($("choice").value)));
$("colour").addEventListener("change", (event) => colourBy(event.target.value));
$("save").addEventListener("click", save);
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(shown.trace.doc.text);
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy text"), 1500);
});
$("copy").hidden = !navigator.clipboard; // there is none on pages of other machines without https
colourBy("confidence");

if (documents.length) {
  listDocuments();
  choose(0);
} else {
  $("save").hidden = false;
  new Live({
    open,
    grow() {
      canvas.grow();
      canvas.update(shown.trace.go(Infinity));
    },
    done(trace) {
      if (!trace.length) {
        if (documents.length) choose(documents.length - 1);
        else $("view").hidden = true;
        return;
      }
      documents.push(trace.doc);
      listDocuments();
      choose(documents.length - 1);
      $("said").textContent = trace.doc.text;
    },
    say(text) { $("alert").textContent = text; },
  });
}

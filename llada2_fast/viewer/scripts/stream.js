// Chat completions of the server that sent this page.

// What went wrong, in words for a person.
class Trouble extends Error {}

function explain(status, error) {
  const said = error && typeof error.message === "string" ? error.message : "";
  if (status === 401 || status === 403) return "The server wants its key. Load this page again and give the key as the password.";
  if (status === 429 || status === 503) return `The server is busy. Try again in a moment.${said ? ` (${said})` : ""}`;
  if (status >= 500) return `Something went wrong in the server.${said ? ` It says: ${said}` : ""}`;
  return said ? `The server did not take this. It says: ${said}` : `The server did not take this (status ${status}).`;
}

// A response of the server; Trouble unless it is one of success.
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch { /* no JSON: the status has to do */ }
  throw new Trouble(explain(response.status, body && body.error));
}

const posted = (body, signal) => ({
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

// The data of server-sent events, parsed, until [DONE]. Trouble for an error among them, and for an end without [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      piece = { done: true };
    }
    if (piece.done) throw new Trouble("The connection to the server broke off before the answer was complete.");
    const lines = (waiting + piece.value).split(/\r\n|\n/);
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Trouble(explain(500, value.error));
      yield value;
    }
  }
}

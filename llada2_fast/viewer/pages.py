"""The page: one HTML file that needs nothing else, made of page.html, page.css and scripts/."""

import json
from functools import cache
from importlib.resources import files

from .document import FORMAT, VERSION

# In this order they are one script. No file of theirs may hold what ends a script.
SCRIPTS = ("trace", "canvas", "details", "timeline", "stream", "live", "main")


def page(document: dict | list[dict] | None = None) -> str:
    """A self-contained HTML page: no other file, no network but its own server's, any text shown as text.

    document: a trace document, or several to choose from; None = the live page, which asks the server that sent it.
    Raises ValueError for what is no trace document.
    """
    documents = [document] if isinstance(document, dict) else document
    if documents is not None:
        if not isinstance(documents, (list, tuple)) or not documents:
            raise ValueError(f"document={document!r:.80}: expected a trace document, several, or None")
        for one in documents:
            _check(one)
    before, after = _parts()
    return before + embedded(documents) + after


def embedded(value) -> str:
    """JSON that can stand in a <script>: ASCII, without what HTML takes for markup. ValueError for NaN and infinity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # only strings hold them, where \\u003c is a character like any other
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _check(document):
    named = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
    if named != (FORMAT, VERSION):
        raise ValueError(f"document={document!r:.80}: expected format {FORMAT!r}, version {VERSION}")


@cache
def _parts():
    """The page before and behind its data."""
    here = files(__package__)
    text = here.joinpath("page.html").read_text("utf-8")
    script = "\n".join(here.joinpath("scripts", f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    text = text.replace("/* page.css */", here.joinpath("page.css").read_text("utf-8"))
    text = text.replace("/* scripts */", script)
    before, data, after = text.partition("/* documents */")
    assert data and "/* documents */" not in after, "page.html names one place for the data"
    return before, after

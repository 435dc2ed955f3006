"""The trace document and the page that holds it."""

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada2_fast import DecodeParams, Engine, LLaDA2Model, demo, load_tokenizer
from llada2_fast.cli import commands, doctor
from llada2_fast.viewer import page, trace_document
from tests.engine.common import UNDERTRAINED

TOKENIZER = load_tokenizer(demo.path())
MASK = TOKENIZER.mask_token_id


@cache
def engine_of(folder):
    return Engine(LLaDA2Model.from_pretrained(folder, progress=False), tokenizer=TOKENIZER)


@pytest.fixture(params=[demo.path(), UNDERTRAINED], ids=["embedded", "undertrained"])
def engine(request):
    return engine_of(request.param)


def ask(engine, prompt, params, **options):
    chat = [{"role": "user", "content": prompt}]
    ids = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    (output,) = engine.generate([ids], params, **{"trace": True, "top_logprobs": 5} | options)
    return output


def document(engine, prompt, params, **options):
    return trace_document(
        ask(engine, prompt, params, **options), TOKENIZER, model="a model", prompt=prompt, params=params,
        block_length=16, mask_id=MASK,
    )  # fmt: skip


def replayed(doc):
    """The canvas after all events, which have to come in order and fit what stands there."""
    canvas, step = {}, 0
    for event in doc["events"]:
        assert event["step"] >= step and event["old"] == canvas.get(event["position"], MASK)
        assert (event["kind"] == "commit") == (event["position"] not in canvas)
        step, canvas[event["position"]] = event["step"], event["token"]
    return [canvas.get(i, MASK) for i in range(len(doc["token_ids"]))]


EDITING = DecodeParams(gen_length=64, threshold=0.3, editing_threshold=0.0, eos_early_stop=True)


@pytest.mark.parametrize("params, options", [
    (EDITING, {}), (replace(EDITING, editing_threshold=None), {}), (replace(EDITING, gen_length=7), {}),
    (replace(EDITING, temperature=2.0, seed=3, eos_early_stop=False), {"stop": ["er"]}),
    (replace(EDITING, profile="hf-2.0", editing_threshold=None, steps=2), {"top_logprobs": 0}),
])  # fmt: skip
def test_events_replay_to_the_answer(engine, params, options):
    for prompt in (doctor.QUESTION, "Spell 4071, 22, 608."):
        doc = document(engine, prompt, params, **options)
        assert replayed(doc) == doc["token_ids"] and len(doc["token_ids"]) > 0
        assert TOKENIZER.decode(doc["token_ids"], skip_special_tokens=True).startswith(doc["text"])
        cost = doc["statistics"]
        assert sum(cost["forwards_per_block"]) == cost["denoise_forwards"] > max(e["step"] for e in doc["events"])
        length, prompt_tokens = doc["block_length"], doc["prompt_tokens"]
        assert cost["blocks"] == len({(prompt_tokens + e["position"]) // length for e in doc["events"]})
        assert json.loads(json.dumps(doc)) == doc


def test_edits_are_told():
    doc = document(engine_of(UNDERTRAINED), "Spell 4071, 22, 608.", EDITING)
    edits = [event for event in doc["events"] if event["kind"] == "edit"]
    assert len(edits) == doc["statistics"]["edits"] > 0


def test_every_id_has_its_text(engine):
    doc = document(engine, doctor.QUESTION, EDITING)
    ids = {MASK, *doc["token_ids"]} | {e[key] for e in doc["events"] for key in ("token", "old")}
    ids |= {token for listed in doc["alternatives"] for token, _ in listed}
    assert doc["vocabulary"] == {str(i): TOKENIZER.decode([i]) for i in ids}
    assert doc["vocabulary"][str(MASK)] == "<|mask|>" and set(doc["special_ids"]) == ids & set(
        TOKENIZER.all_special_ids
    )
    assert [len(listed) for listed in doc["alternatives"]] == [5] * len(doc["token_ids"])
    assert doc["params"] == {
        "gen_length": 64, "threshold": EDITING.threshold, "editing_threshold": 0.0, "eos_early_stop": True
    }  # fmt: skip


def test_what_is_no_trace(engine):
    output = ask(engine, doctor.QUESTION, EDITING, trace=False)
    told = {"model": "m", "prompt": None, "params": EDITING, "mask_id": MASK}
    with pytest.raises(ValueError, match="trace=True"):
        trace_document(output, TOKENIZER, block_length=16, **told)
    with pytest.raises(ValueError, match="block_length=32: expected 16"):
        trace_document(ask(engine, doctor.QUESTION, EDITING), TOKENIZER, block_length=32, **told)
    for bad in ({}, [], "a", [{"format": "llada2_fast.trace", "version": 2}], 7):
        with pytest.raises(ValueError, match="document="):
            page(bad)


class Elements(HTMLParser):
    """The tags of a page, the addresses in it, and its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.data, self._inside = [], [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        self._inside = ("id", "documents") in attributes

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""


def sketch(text):
    return {"format": "llada2_fast.trace", "version": 1, "prompt": text, "vocabulary": {"1": text}, "text": text}


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("</!->&\u2028\u2029script"))))
def test_no_text_becomes_markup(text):
    plain, found = Elements(page(sketch("plain"))), Elements(page(sketch(text)))
    assert found.tags == plain.tags and json.loads(found.data) == [sketch(text)]
    assert found.data.isascii() and not set("<>&") & set(found.data)


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "]]>", "\u2028", "</SCRIPT >"])
def test_what_would_end_the_data(text):
    assert json.loads(Elements(page(sketch(text))).data) == [sketch(text)]


def test_a_page_needs_nothing_else():
    live = page()
    found = Elements(live)
    assert json.loads(found.data) is None and found.addresses == ["data:,"]
    assert set(re.findall(r"\w+://[^\s\"'<>)]*", live)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|\beval\b", live)
    assert found.tags.count("script") == 2 and found.tags.count("style") == 1
    assert "/* scripts */" not in live and "/* page.css */" not in live
    assert page([sketch("a"), sketch("b")]).count("llada2_fast.trace") == live.count("llada2_fast.trace") + 2


def test_ink_can_be_read_on_every_colour():
    css = page().partition("<style>")[2].partition("</style>")[0]
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", theme)) for theme in re.findall(r":root \{(.*?)\}", css, re.S)]
    assert len(themes) == 2
    for theme in themes:
        grounds = [name for name in theme if re.match(r"(confidence|step)-\d", name)]
        assert len(grounds) == 16
        assert min(contrast(theme["ink"], theme[name]) for name in grounds) >= 4.5
        for name in ("muted", "mark", "trouble", "accent"):
            assert min(contrast(theme[name], theme[ground]) for ground in ("ground", "surface", "sunken")) >= 4.5


def contrast(one, other):
    """As WCAG has it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def generate(capsys, *arguments):
    code = commands.main(["generate", "--no-progress", *arguments])
    return code, *capsys.readouterr()


def test_the_command_line_writes_a_page(capsys, tmp_path):
    file = tmp_path / "out.html"
    code, out, err = generate(capsys, doctor.QUESTION, "--trace", str(file))
    assert (code, out) == (0, doctor.ANSWER + "\n") and err.startswith("36 tokens, ")
    (doc,) = json.loads(Elements(file.read_text("utf-8")).data)
    assert (doc["prompt"], doc["text"], doc["finish_reason"]) == (doctor.QUESTION, doctor.ANSWER, "eos")
    assert doc["model"] == "the embedded model" and replayed(doc) == doc["token_ids"]


@pytest.mark.parametrize("options", [
    [], ["--temperature", "1.5", "--seed", "5"], ["--block-length", "8", "--profile", "hf-2.1", "--max-tokens", "40"],
    ["--eos-id", "-1", "--max-tokens", "33"], ["--raw"], ["--choices", "yes,no"],
    ["--policy", "self_speculative", "--entropy-bound", "0"], ["--policy", "entropy", "--temperature", "0.5"],
    ["--canvas", "The answer is {gap:3} or {gap:40}.", "--regex", "[0-9]+"],
    ["--canvas", "{gap:9}" + "The answer is 7. " * 150, "--block-length", "64"],  # longer than what fits otherwise
])  # fmt: skip
def test_answers_are_those_without_a_trace(capsys, tmp_path, options):
    prompts, file = [doctor.QUESTION, "Reverse moon crow bread lamp."], tmp_path / "out.json"
    asked = [*prompts, "--json", *options]
    code, traced, _ = generate(capsys, *asked, "--trace", str(file))
    assert code == 0
    _, plain, _ = generate(capsys, *asked)
    documents = json.loads(file.read_text("utf-8"))
    for a, b, doc in zip(traced.splitlines(), plain.splitlines(), documents, strict=True):
        a, b = json.loads(a), json.loads(b)
        for name in ("batch_seconds", "prefill_s"):
            assert a.pop(name) >= 0 and b.pop(name) >= 0
        # who shares a batch's prefill is counted apart
        assert {k: v for k, v in a.items() if "forwards" not in k} == {
            k: v for k, v in b.items() if "forwards" not in k
        }
        for name in ("denoise_forwards", "check_forwards"):
            assert a[name] == b[name]
        assert (a["check_forwards"] > 0) == ("self_speculative" in options)
        assert (doc["token_ids"], doc["prompt"]) == (a["token_ids"], a["prompt"])


@pytest.mark.parametrize("name, words", [
    ("out.txt", "expected a name that ends in .html or .json"), ("no/such/out.html", "a folder that exists"),
    ("folder.html", "expected a file"),
])  # fmt: skip
def test_a_bad_place_is_told_before_anything_is_loaded(capsys, tmp_path, name, words):
    (tmp_path / "folder.html").mkdir()
    code, out, err = generate(capsys, "x", "--model", "no/such/model", "--trace", str(tmp_path / name))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1

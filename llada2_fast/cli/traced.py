"""generate --trace FILE and --watch: the tokens of generate(), by the engine, which tells how they come about."""

import json
import os
import sys
import time
from pathlib import Path

from .answers import summarize, told
from .options import fit, model_name, params
from .screen import Screen, colours

PAGES, DATA = (".html", ".htm"), (".json",)


def check(trace, watch, prompts):
    """ValueError for what --trace and --watch cannot do; nothing has been loaded yet."""
    if trace is not None:
        path = Path(trace)
        if path.suffix.lower() not in PAGES + DATA:
            raise ValueError(f"--trace={trace!r:.200}: expected a name that ends in .html or .json")
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"--trace={trace!r:.200}: expected a file in a folder that exists")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"--trace={trace!r:.200}: expected a place that may be written to")
    if watch:
        _terminal(text_last=False)
        if len(prompts) != 1:
            raise ValueError(f"--watch: expected one prompt, got {len(prompts)}")


def answer(model, tokenizer, prompts, rows, options, args):
    """(answers, documents, whether the text is on stdout already).

    prompts, rows: text and ids of each.
    args: of the command line; args.watch shows the one there is as it comes about.
    Answers are those of answers.answer, documents the viewer's.
    """
    from ..viewer import ALTERNATIVES, trace_document

    options = fit(options, model, rows)
    wanted = {"trace": args.trace is not None, "canvas": options.pop("canvas", None)}
    if args.trace:
        wanted["top_logprobs"] = min(ALTERNATIVES, model.config.vocab_size)
    how = params(options)
    engine = _engine(model, tokenizer, rows, how)
    started, printed = time.perf_counter(), False
    if args.watch:
        stream = _terminal(text_last=args.json)
        outputs = [_watched(engine, tokenizer, engine.add_request(rows[0], how, **wanted), stream)]
        printed = stream is sys.stdout and not args.json
    else:
        outputs = engine.generate(rows, how, progress=args.progress, **wanted)
    seconds = time.perf_counter() - started
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
    answers = [told(tokenizer, o.token_ids, o.prompt_length, o.finish_reason, o.counters, seconds) for o in outputs]
    summarize(answers)
    name = model_name(args.model) if args.model else "the embedded model"
    documents = [
        trace_document(
            output, tokenizer, model=name, prompt=prompt, params=how, block_length=engine.intake.block_length,
            mask_id=engine.intake.mask_id,
        )
        for output, prompt in zip(outputs, prompts, strict=True)
    ] if args.trace else []  # fmt: skip
    return answers, documents, printed


def write(path, documents):
    """The documents into a file, as a page or as JSON, as its name says. JSON is a list if there are several."""
    from ..viewer import page

    one_or_all = documents[0] if len(documents) == 1 else documents
    as_data = Path(path).suffix.lower() in DATA
    Path(path).write_text(json.dumps(one_or_all, indent=1) if as_data else page(one_or_all), encoding="utf-8")


def _engine(model, tokenizer, rows, how):
    """An engine with room for these rows and no more."""
    from ..config import EngineConfig, room_for
    from ..engine import Engine

    length, together = how.block_length or model.block_length, min(EngineConfig.max_num_seqs, len(rows))
    lengths = [len(row) + how.gen_length for row in rows]
    config = EngineConfig(
        block_length=length, cache_tokens=room_for(lengths, length, together, how.edit_window, how.checks),
        mask_id=how.mask_id, max_num_seqs=together, max_eos_ids=max(EngineConfig.max_eos_ids, len(how.eos_ids or ())),
    )  # fmt: skip
    return Engine(model, config, tokenizer)


def _terminal(text_last):
    """Where --watch draws: on stdout, where the text belongs, if this is a terminal, else on stderr. text_last: stdout
    is for something else."""
    if os.environ.get("TERM") == "dumb":
        raise ValueError("--watch: expected a terminal whose cursor can be moved, but TERM=dumb")
    streams = [sys.stderr, sys.stdout] if text_last else [sys.stdout, sys.stderr]
    for stream in streams:
        if stream.isatty():
            return stream
    raise ValueError("--watch: expected a terminal")


def _watched(engine, tokenizer, request, stream):
    """The request's output; meanwhile the terminal shows its text, and behind it the open block."""
    mask_id, style = engine.intake.mask_id, colours(os.environ)
    with Screen(stream) as screen:
        for event in engine.stream(request):
            if event.kind == "draft":
                pairs = zip(event.token_ids, event.confidences, strict=True)
                screen.show("", [_piece(tokenizer, token, p, mask_id, screen.mask, style) for token, p in pairs])
            elif event.text:
                screen.show(event.text)
    return request.output


def _piece(tokenizer, token, confidence, mask_id, mask, style):
    """(text, how it is drawn) of a token of the open block. What is no text at the end is none here."""
    if token == mask_id:
        return mask, style(None)
    return tokenizer.decode([token], skip_special_tokens=True), style(confidence)

"""Answers in a language: whether they are valid, what they cost, and whether they are as right as free ones.

    llada2-fast bench structured [--quick] [--json] [--save [FOLDER]] [--plot FILE]

valid: the share of answers that parse as JSON and validate under the schema that they were asked for. Each schema of
    benchmarks.schemas has prompts at several thresholds and temperatures, of the first model and of random weights of
    its shape, together with rows without a language, which must be what generate() gives them alone.
builds: from the schema to its automaton; median and worst.
real_size: the same of a nested schema over as many made-up tokens as LLaDA2's vocabulary has.
points: the task json of the embedded model, whose answers are lines key=value, free and in the language of such lines:
    exact match, tokens per forward (TPF) and denoise forwards. Prompts are those of benchmarks.quality; all is exact.
hosts: what a row under a language adds to a step's host work (the passes over the automaton, deciding, writing): median
    CPU time of the engine's thread outside of the runner, so that neither the model nor other processes tell, over the
    steps of some answers, less the same without a language. A token a step; first_: of the first answer in a language,
    where nothing has been looked up before.
launches: of a refinement step's kernels, sampling with filters; the rows free, and under a language.

Models: the embedded one and, in a checkout, its less trained sibling (benchmarks.sampling). Exit code 1 unless all
answers are valid, those in the language are as right as free ones at every threshold, and launches are equal.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from itertools import chain, product

import numpy as np
import torch

from llada2_fast import LLaDA2Model
from llada2_fast.config import MAX_STATES, DecodeParams, EngineConfig
from llada2_fast.decoding.inputs import resolve_ids
from llada2_fast.demo import tasks
from llada2_fast.engine import Engine
from llada2_fast.kernels.refine import MAX_CLASSES
from llada2_fast.structured import TokenAutomaton, automaton_of
from llada2_fast.structured.compiler import Limits, compile_tokens
from llada2_fast.structured.ranges import decimals
from llada2_fast.structured.schema import json_regex
from llada2_fast.weights.special_tokens import load_tokenizer

from . import harness, quality
from .bench_host import Network
from .models import random_model
from .sampling import add_model_option, checkpoints
from .schemas import SCHEMAS
from .workload import questions, require_equal

TASK = "json"
THRESHOLDS, QUICK_THRESHOLDS = quality.THRESHOLDS, (0.95, 0.7)
HEADLINE = 0.95  # threshold of the figures that stand for the first model
DRAWS = tuple(product((0.95, 0.3), (0.0, 1.0)))  # threshold and temperature of answers under schemas
QUICK_DRAWS = (DRAWS[0], DRAWS[-1])
ROOM = 64  # tokens of an answer under a schema
REAL_SIZE = 157_184  # tokens of LLaDA2's vocabulary
TOGETHER = 16  # schemas in one batch, and its places
ONE_BY_ONE = {"threshold": quality.NEVER, "gen_length": ROOM, "eos_early_stop": True}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser)
    add_model_option(parser)
    parser.add_argument("--n", type=harness.positive, metavar="N", help="prompts of the task (120, with --quick 24)")
    parser.add_argument("--schemas", type=harness.positive, metavar="N", help="the first N of them alone")
    harness.add_plot_option(parser, "right answers against tokens per forward, free and in the language")
    options = parser.parse_args(argv)
    harness.check_save(parser, options, "structured")
    torch.set_num_threads(1)
    named = checkpoints(options.model)
    tokenizer = load_tokenizer(named[0][1])
    models = {name: LLaDA2Model.from_pretrained(path, torch.float32, progress=False) for name, path in named}
    first = next(iter(models.values()))
    schemas = dict(list(SCHEMAS.items())[: options.schemas])
    draws, each = (QUICK_DRAWS, 1) if options.quick else (DRAWS, 2)
    results = validity(first, tokenizer, schemas, draws, each)
    largest = max(results["builds"]["built"], key=lambda build: build["states"])["schema"]
    prompts = tasks.sample(TASK, options.n or (24 if options.quick else tasks.PROMPTS), tasks.SEED)
    results |= hosts(first, tokenizer, prompts[: 4 if options.quick else 12], largest)
    thresholds = QUICK_THRESHOLDS if options.quick else THRESHOLDS
    results["points"] = [
        point(name, model, tokenizer, prompts, threshold) for name, model in models.items() for threshold in thresholds
    ]
    results |= headline(results["points"]) | launches() | {"prompts": len(prompts), "real_size": real_size()}
    results["ok"] = is_ok(results)
    print("\n".join(told(results)))
    if options.plot:
        draw(results["points"], options.plot)
    harness.finish("structured", options, results)
    return int(not results["ok"])


# Answers under schemas.


def validity(model, tokenizer, schemas, draws, each):
    """Figures of the answers under schemas, a few schemas at a time: no more languages are kept than fit a batch.

    draws: thresholds and temperatures; each: prompts per schema and draw.
    """
    rows = quality.encode(tokenizer, questions(each + 1))
    models = {"trained": model, "random": random_model(replace(model.config, **model.special_ids))}
    built, refused, wrong, answers = [], {}, [], 0
    for at in range(0, len(schemas), TOGETHER):
        known = {}
        for name, schema in list(schemas.items())[at : at + TOGETHER]:
            try:
                built.append({"schema": name} | build(model, tokenizer, schema))
                known[name] = schema
            except ValueError as error:
                refused[name] = str(error)
                print(f"{name}: refused: {error}")
        for kind, network in models.items():
            for name, text in answered(network, tokenizer, known, draws, rows):
                answers += 1
                fault = fault_of(text, schemas[name])
                if fault:
                    wrong.append({"schema": name, "model": kind, "text": text, "fault": fault})
                    print(f"invalid: {wrong[-1]}")
    return {
        "valid": 1 - len(wrong) / max(1, answers), "schemas": len(built), "answers": answers, "invalid": wrong,
        "builds": {"refused": refused, "built": built} | summary(built),
    }  # fmt: skip


def language(model, tokenizer, **params):
    """The automaton of what DecodeParams ask for, as an engine would have it."""
    params = DecodeParams(**params)
    mask_id, eos_ids, _ = resolve_ids(model, params)
    return automaton_of(params, tokenizer, eos_ids, mask_id, model.config.vocab_size, MAX_STATES)


def build(model, tokenizer, schema):
    """What a schema's automaton takes; ValueError where it is refused."""
    started = time.perf_counter()
    automaton = language(model, tokenizer, json_schema=schema)
    ms = 1e3 * (time.perf_counter() - started)
    return {"ms": round(ms, 1), "states": automaton.num_states, "classes": automaton.table.shape[1]}


def summary(built):
    """Median and worst of each figure of builds."""
    figures = {}
    for name in ("ms", "states", "classes"):
        values = [one[name] for one in built]
        figures |= {f"median_{name}": statistics.median(values), f"worst_{name}": max(values)}
    return figures


def answered(model, tokenizer, schemas, draws, rows):
    """(schema's name, text) of each answer. One row in so many has no language.

    rows: prompts; the last is that of rows without a language.
    """
    *prompts, other = rows
    free = {"gen_length": ROOM, "eos_early_stop": True, "seed": 0}
    jobs = []  # schema's name, prompt, parameters
    for name, schema in schemas.items():
        for seed, ((threshold, temperature), prompt) in enumerate(product(draws, prompts)):
            rules = {"threshold": threshold, "temperature": temperature, "seed": seed, "json_schema": schema}
            jobs.append((name, prompt, DecodeParams(**free | rules)))
        jobs.append((None, other, DecodeParams(**free)))
    engine = Engine(model, EngineConfig(max_num_seqs=TOGETHER, trace=False), tokenizer)
    outputs = engine.generate([prompt for _, prompt, _ in jobs], [params for _, _, params in jobs])
    beside = [output.token_ids for (name, _, _), output in zip(jobs, outputs, strict=True) if name is None]
    alone = model.generate([other], **free)[0].tolist()
    require_equal(beside, [alone] * len(beside), f"{len(beside)} rows without a language beside others", model.dtype)
    return [(name, output.text) for (name, _, _), output in zip(jobs, outputs, strict=True) if name is not None]


def fault_of(text, schema):
    """What is wrong with an answer, None if it is valid."""
    import jsonschema

    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text, parse_constant=_no_json))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).partition("\n")[0]
    return None


def _no_json(name):
    raise ValueError(f"{name} is no JSON")


def real_size():
    """Figures of an automaton over a vocabulary of LLaDA2's size: words of letters, some with a space, and what JSON is
    made of."""
    rng, texts = random.Random(0), {bytes([byte]): None for byte in range(256)}
    while len(texts) < REAL_SIZE:
        word = "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 9)))
        parts = ['"', '",', '":', '{"', '"}', ", ", "[", "1", "23", ""]
        texts[(rng.choice(parts) + word if rng.random() < 0.1 else rng.choice(["", " "]) + word).encode()] = None
    string = {"type": "string", "maxLength": 40}
    person = {"name": string, "zip": {"type": "string", "pattern": "[0-9]{5}"}, "age": {"type": "integer"}}
    tags = {"type": "array", "items": string, "minItems": 1, "maxItems": 4}
    inner = {"type": "object", "properties": person, "required": [*person]}
    schema = {"type": "object", "properties": {"who": inner, "tags": tags}, "required": ["who", "tags"]}
    started = time.perf_counter()
    dfa = compile_tokens(json_regex(schema), [*texts], Limits(MAX_STATES, MAX_CLASSES - 1))
    automaton = TokenAutomaton(dfa._replace(classes=np.append(dfa.classes, np.int16(0))), (len(texts),))
    seconds = time.perf_counter() - started
    return {"vocab": len(texts), "states": automaton.num_states, "classes": automaton.table.shape[1],
            "seconds": round(seconds, 2)}  # fmt: skip


# The task.


def lines():
    """The regular expression of lines key=value with the task's fields and values."""
    fields = []
    for name, values in tasks.FIELDS.items():
        is_range = isinstance(values, range)
        value = decimals(values[0], values[-1], 0) if is_range else "|".join(values)
        fields.append(f"{name}=(?:{value})")
    line = f"(?:{'|'.join(fields)})"
    return f"{line}(?:\\n{line})*"


def point(name, model, tokenizer, prompts, threshold):
    """Free answers and those in the language of lines."""
    free = score(model, tokenizer, prompts, threshold)
    constrained = score(model, tokenizer, prompts, threshold, regex=lines())
    return {"model": name, "threshold": threshold, "free": free, "constrained": constrained}


def score(model, tokenizer, prompts, threshold, **language):
    rules = quality.ENDING | {"threshold": threshold, "tokenizer": tokenizer} | language
    output = model.generate(quality.encode(tokenizer, prompts), **rules)
    pairs = zip(prompts, quality.decode(tokenizer, output), strict=True)
    right = sum(tasks.check(TASK, *pair) for pair in pairs)
    forwards = sum(counters.denoise_forwards for counters in output.counters)
    return quality.figures((right / len(prompts), output.tokens_per_forward)) | {"forwards": forwards}


def headline(points):
    """The first model's figures at HEADLINE."""
    chosen = next(one for one in points if one["threshold"] == HEADLINE)
    return {f"{key}_{kind}": chosen[kind][key] for key in ("tpf", "accuracy") for kind in ("free", "constrained")}


# The host.


class Runner(Network):
    """A decoder's runner with a clock in it: what a step is outside of it is the host's."""

    def execute(self, plan):
        return self._timed(self.model.execute, plan)

    def prefill(self, parts):
        return self._timed(self.model.prefill, parts)


def hosts(model, tokenizer, prompts, largest):
    """Figures of a step's host work under the task's language and under the schema with the most states."""
    languages = {"lines of the task": {"regex": lines()}, largest: {"json_schema": SCHEMAS[largest]}}
    rows, found = quality.encode(tokenizer, prompts), []
    free, steps = [], {name: [] for name in languages}
    automata = {name: language(model, tokenizer, **params) for name, params in languages.items()}
    for automaton in automata.values():
        for lookup in (automaton.after, automaton.before, automaton.choice, automaton.within):
            lookup.cache_clear()
    for row in rows:  # in turn, so that a slow spell of the machine hits them alike
        free.append(step_us(model, tokenizer, row))
        for name, params in languages.items():
            steps[name].append(step_us(model, tokenizer, row, **params))
    base = statistics.median(chain(*free))
    for name, (first, *others) in steps.items():
        automaton = automata[name]
        found.append({
            "language": name, "states": automaton.num_states, "classes": automaton.table.shape[1],
            "us_per_step": round(statistics.median(chain(*others)) - base, 1),
            "first_us_per_step": round(statistics.median(first) - base, 1),
        })  # fmt: skip
    return {"host_us_per_step": found[0]["us_per_step"], "free_host_us_per_step": round(base, 1), "hosts": found}


def step_us(model, tokenizer, prompt, **language):
    """Microseconds of the host's in each step of one answer."""
    engine = Engine(model, EngineConfig(max_num_seqs=1, trace=False), tokenizer)
    runner = engine.decoder.runner = Runner(engine.decoder.runner)
    engine.add_request(prompt, DecodeParams(**ONE_BY_ONE, **language))
    steps = []
    while engine.has_work:
        steps.append(1e3 * runner.host_ms(engine.step))
    return steps


def launches():
    """How many kernels a refinement step launches."""
    from .counts import launches as launched

    kinds = {"free": {}, "guided": {"guided": True}}
    with torch.inference_mode():
        return {f"launches_{kind}": len(launched("top_k_top_p", **how)) for kind, how in kinds.items()}


# What is told.


def is_ok(results):
    as_right = all(one["constrained"]["accuracy"] >= one["free"]["accuracy"] for one in results["points"])
    return results["valid"] == 1 and as_right and results["launches_guided"] <= results["launches_free"]


def told(results):
    builds = results["builds"]
    yield (
        f"{results['answers']} answers under {results['schemas']} schemas: {results['valid']:.1%} valid; refused: "
        f"{', '.join(builds['refused']) or 'none'}"
    )
    for name, unit in (("ms", " ms"), ("states", ""), ("classes", "")):
        yield f"{name} of a build: median {builds[f'median_{name}']:g}{unit}, worst {builds[f'worst_{name}']:g}{unit}"
    real = results["real_size"]
    yield f"{real['vocab']} tokens: {real['states']} states, {real['classes']} classes, {real['seconds']} s"
    yield f"{'model':<16}{'threshold':<12}{'free: exact match, TPF':>28}{'in its language':>28}{'forwards':>16}"
    for one in results["points"]:
        free, own = one["free"], one["constrained"]
        cells = "".join(f"{kind['accuracy']:>20.3f}, {kind['tpf']:6.2f}" for kind in (free, own))
        yield f"{one['model']:<16}{one['threshold']:<12g}{cells}{free['forwards']:>8} {own['forwards']:>7}"
    for one in results["hosts"]:
        yield (
            f"a step's host work under {one['language']}, {one['states']} states: {one['us_per_step']:.0f} us more "
            f"than {results['free_host_us_per_step']:.0f}, in the first answer {one['first_us_per_step']:.0f}"
        )
    yield f"launches: {results['launches_free']} free, {results['launches_guided']} guided"
    yield "ok" if results["ok"] else "not ok"


def draw(points, file):
    """Exact match by TPF, a line per model, free and in the language."""
    models = list(dict.fromkeys(one["model"] for one in points))
    with harness.drawing(file, figsize=(7, 4.5)) as axes:
        for model, (kind, style) in product(models, (("free", "o--"), ("constrained", "s-"))):
            own = [one for one in points if one["model"] == model]
            at = [(one[kind]["tpf"], one[kind]["accuracy"]) for one in own]
            color, label = f"C{models.index(model)}", "free" if kind == "free" else "in the language"
            axes.plot(*zip(*at, strict=True), style, color=color, label=f"{model}, {label}", markersize=5)
            for place, one in zip(at, own, strict=True):
                axes.annotate(f"{one['threshold']:g}", place, (4, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel=quality.SPEEDS["tpf"], ylabel="exact match, task json", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(title="thresholds", fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())

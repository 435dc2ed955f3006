"""lm-eval, the Language Model Evaluation Harness (0.4.13), with our engine behind its own command line:

    python -m llada2_fast.adapters.lm_eval run --model llada2_fast --model_args pretrained=FOLDER,threshold=0.9 \\
        --apply_chat_template --tasks gsm8k

lm-eval finds no models by entry point, so this registers one and goes on as `lm-eval` itself. Without `pretrained` it
is the embedded model, and `--tasks llada2_demo` scores it on the prompts of `python -m benchmarks.quality`.

Log-likelihoods are lower bounds under block diffusion (likelihood.py has the definition), the same for the same
`mc_num` and `mc_seed`; a continuation counts as greedy if greedy decoding, by the rule of the model_args, writes it.

Contexts too long for the model lose their left end, with lm-eval's warning, as they do with lm-eval's own models. What
cannot fit even so, or not into `cache_tokens`, ends the run before its first forward, and all such requests are named.
A request that fails later is named in a warning and counted in the results (`failed_requests`), and the others go on.
Its answer is the one lm-eval takes where an API gives none, "", and as a likelihood -inf; --use_cache keeps that, too.
"""

import logging
import math
import sys
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import demo
from ..config import DTYPES, PRESETS, DecodeParams, EngineConfig, find_device, room_for
from ..decoding.inputs import resolve_ids
from ..engine import Engine
from ..model import LLaDA2Model
from ..weights import checkpoint
from ..weights.special_tokens import load_tokenizer
from .likelihood import likelihood_bound

MODEL = "llada2_fast"
TASKS = Path(__file__).parent / "lm_eval_tasks"  # found without --include_path
DECODING = tuple(field.name for field in fields(DecodeParams))
NEUTRAL = {"num_beams": 1}  # what tasks say of other models' decoding; any other value is an error
_logger = logging.getLogger("llada2_fast.lm_eval")  # not __name__: of a command that is __main__


def main():
    """lm-eval's command line (`run`, `ls`, `validate`), which knows --model llada2_fast and --tasks llada2_demo."""
    if find_spec("lm_eval") is None:
        sys.exit("llada2_fast.adapters.lm_eval: lm-eval is not installed: pip install 'lm-eval>=0.4.13'")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    register()
    parser = HarnessCLI()
    args = parser.parse_args()
    _complete(args)
    parser.execute(args)


def _complete(args):
    """Put our tasks on the include path and, for our model, our defaults in the place of lm-eval's where neither the
    command line nor its --config file says anything: the GPU if there is one, not always; the engine's batch size, not
    one; and the chat template for the embedded model's tasks, which are chats."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    if not hasattr(args, "include_path"):  # no subcommand: it prints the help
        return
    config = EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}

    def given(name):
        return getattr(args, name, None) or config.get(name)

    paths = given("include_path") or []
    args.include_path = [TASKS, *([paths] if isinstance(paths, str) else paths)]
    if args.command == "run" and given("model") == MODEL:
        args.device = given("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        args.batch_size = given("batch_size") or "auto"
        tasks = given("tasks") or []
        if any(str(task).startswith("llada2_demo") for task in (tasks.split(",") if isinstance(tasks, str) else tasks)):
            args.apply_chat_template = given("apply_chat_template") or True


def register():
    """Make lm-eval know `llada2_fast`; returns the class, an lm_eval.api.model.LM. For programs that call
    `lm_eval.simple_evaluate(model="llada2_fast", ...)` themselves; doing it again is harmless."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry, register_model

    if MODEL in model_registry:
        return model_registry.get(MODEL)
    return register_model(MODEL)(type("LLaDA2LM", (LLaDA2LM, TemplateLM), {}))


class LLaDA2LM:
    """What lm-eval calls, without its base class; `register` joins them.

    pretrained: folder or hub id, None = the embedded model.
    revision: of a hub id.
    dtype: "auto" = the checkpoint's (embedded model: float32).
    device: None = the GPU if there is one.
    quantization, exact: as of LLaDA2Model.from_pretrained.
    batch_size: rows decoded together, "auto" = EngineConfig's, or max_batch_size.
    max_batch_size: what "auto" is.
    cache_tokens: of the engine's cache; None = what that many of the largest requests need.
    graphs: replay each step as a CUDA graph, on a GPU.
    mc_num, mc_seed: of `likelihood_bound`.
    preset: one of PRESETS.
    trust_remote_code: changes nothing: no checkpoint's code is run.
    decode: DecodeParams' fields, where `gen_length` is for tasks that name no max_gen_toks, and end tokens are honoured
        unless eos_early_stop=False.
    Raises ValueError for anything else, before any weight is read.
    """

    def __init__(
        self, pretrained=None, revision=None, dtype="auto", device=None, quantization=None, exact=True,
        batch_size="auto", max_batch_size=None, cache_tokens=None, graphs=False, mc_num=128, mc_seed=0, preset=None,
        trust_remote_code=False, **decode,
    ):  # fmt: skip
        super().__init__()
        _known("model_args", decode, DECODING)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset={preset!r:.80}: expected one of {', '.join(PRESETS)}")
        self.params = DecodeParams(
            **{"gen_length": 256, "eos_early_stop": True} | PRESETS.get(preset, {}) | decode,
        )
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.batch_sizes = {0: self.batch_size}  # lm-eval prints them with the results
        self.cache_tokens, self.graphs = cache_tokens, graphs
        self._engine_config(1, 1)  # its checks
        self.mc_num, self.mc_seed = _integer("mc_num", mc_num, 1), _integer("mc_seed", mc_seed, 0)
        if dtype not in (None, "auto", *DTYPES):
            raise ValueError(f"dtype={dtype!r:.80}: expected auto or one of {', '.join(DTYPES)}")
        self._device = find_device(device)
        if graphs and self._device.type != "cuda":
            raise ValueError(f"graphs=True: expected a GPU, not {self._device}")
        own = "float32" if pretrained is None else None
        self.pretrained, self.revision, self.quantization = pretrained or demo.path(), revision, quantization
        folder = checkpoint.resolve(self.pretrained, revision)
        self.tokenizer = load_tokenizer(folder)
        self.model = LLaDA2Model.from_pretrained(
            folder, DTYPES.get(own if dtype in (None, "auto") else dtype), self._device, quantization=quantization,
            exact=exact,
        )  # fmt: skip
        self.mask_id, self.eos_ids, _ = resolve_ids(self.model, self.params)
        self.tokens = self.forwards = self.failed = 0

    # what lm-eval asks about

    @property
    def max_length(self):
        """Positions of the model, prompt and answer together."""
        return self.model.config.max_position_embeddings

    @property
    def max_gen_toks(self):
        return self.params.gen_length

    @property
    def eot_token_id(self):
        """The first end token; text without a context is scored behind it."""
        known = [i for i in self.eos_ids if 0 <= i < self.model.config.vocab_size]
        if not known:
            raise ValueError(f"eos_ids={self.eos_ids!r}: text without a context needs an end token before it")
        return known[0]

    @property
    def tokenizer_name(self):
        """For the names of lm-eval's request caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Ids of a text as it stands. No special token is added: the chat template writes its own."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """[{"role", "content"}, ...] -> the prompt; without a generation prompt the last message is left open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self):
        """What was run and how it went: lm-eval puts it into the results' `config`."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.revision or "",
            "llada2_fast": {
                "version": sys.modules["llada2_fast"].__version__,
                "torch": torch.__version__,
                "device": str(self.model.device),
                "pretrained": str(self.pretrained),
                "quantization": self.quantization,
                "exact": self.model.exact,
                "batch_size": self.batch_size,
                "decode_params": asdict(self.params) | {"eos_ids": self.eos_ids, "mask_id": self.mask_id},
                "likelihood": {"is": "block-diffusion bound", "mc_num": self.mc_num, "mc_seed": self.mc_seed},
                "failed_requests": self.failed,
                "generated_tokens": self.tokens,
                "denoise_forwards": self.forwards,
                "tokens_per_forward": self.tokens / max(1, self.forwards),
            },
        }  # fmt: skip

    # text

    def generate_until(self, requests, disable_tqdm=False):
        """Texts of (context, options) requests, cut before the first of the `until` strings.

        options: until, max_gen_toks and its other names, do_sample, temperature, and any of DecodeParams; what they do
        not say is the model_args'. do_sample without a temperature means the model_args', or 1. With a `seed`, the
        request's place in the list is added to it. A context too long for the model is cut on the left, with a warning.
        The text of a request that failed is empty. Raises ValueError before the first forward.
        """
        work = [self._work(*request.args, place) for place, request in enumerate(requests)]
        names = list(map(_document, requests))
        texts = [""] * len(work)
        for place, output in self._run(work, names, "Running generate_until requests", disable_tqdm):
            if output.error:
                self._report(output.error)
                continue
            texts[place] = output.text
            self.tokens += len(output.token_ids)
            self.forwards += output.counters.denoise_forwards
            self.cache_hook.add_partial("generate_until", requests[place].args, output.text)
        return texts

    def _work(self, context, options, place):
        """A request of lm-eval -> (prompt ids, DecodeParams, stops as Engine.add_request takes them)."""
        from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs

        given = normalize_gen_kwargs(options, self.params.gen_length)
        stop, length = [text for text in given.pop("until") if text], given.pop("max_gen_toks")
        if not all(isinstance(text, str) for text in stop):
            raise ValueError(f"until={stop!r:.80}: expected strings")
        if given.pop("do_sample"):
            given.setdefault("temperature", self.params.temperature or 1.0)
        for name in NEUTRAL.keys() & given.keys():
            if (value := given.pop(name)) != NEUTRAL[name]:
                raise ValueError(f"{name}={value!r:.80}: expected {NEUTRAL[name]}")
        _known("gen_kwargs", given, DECODING)
        params = replace(self.params, gen_length=length, **given)
        if params.seed is not None:
            params = replace(params, seed=params.seed + place)
        prompt = self.tok_encode(context)
        if length < self.max_length:  # else no context fits, which the engine refuses
            prompt, _ = maybe_truncate(prompt, length, self.max_length)
        # special tokens are no part of the text, so that those among the stops are looked for as ids
        special = {added.content: i for i, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        stops = {"stop": stop, "stop_token_ids": [special[text] for text in stop if text in special]}
        return prompt, params, stops

    def _run(self, work, names, desc, disable_tqdm):
        """Yields (place in `work`, RequestOutput) as the requests end, batch_size of them in flight.

        names: of the requests, for errors. Raises ValueError before the first forward for all that can never be run,
        RuntimeError when several have failed and none has not.
        """
        if not work:
            return
        length = self.params.block_length or self.model.block_length
        lengths = [len(prompt) + params.gen_length for prompt, params, _ in work]
        most = room_for([self.max_length], length, 1)
        window, checks = max(params.edit_window for _, params, _ in work), any(params.checks for _, params, _ in work)
        needed = room_for([one for one in lengths if one <= most], length, self.batch_size, window, checks)
        engine = Engine(self.model, self._engine_config(needed, len(work)), self.tokenizer)
        places, wrong = {f"{place} ({name})": place for place, name in enumerate(names)}, []
        for request_id, (prompt, params, stops) in zip(places, work, strict=True):
            try:
                engine.add_request(prompt, params, request_id=request_id, **stops)
            except ValueError as error:
                wrong.append(f"request {request_id}: {error}")
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(work)} requests can never be run: {'; '.join(wrong)}")
        failed = 0
        with tqdm(total=len(work), desc=desc, disable=disable_tqdm or self.rank != 0) as bar:
            while engine.has_work:
                for event in engine.step():
                    if event.kind == "finish":
                        failed += event.output.error is not None
                        if failed == len(work) > 1:
                            raise RuntimeError(f"all {failed} requests have failed, the last one: {event.output.error}")
                        yield places[event.request_id], event.output
                        bar.update()

    def _report(self, error):
        """A request has failed: it is counted and named, and the others go on."""
        self.failed += 1
        _logger.warning("no answer, the others go on: %s", error)

    def _engine_config(self, needed, requests):
        return EngineConfig(
            block_length=self.params.block_length, max_num_seqs=self.batch_size, trace=False, graphs=self.graphs,
            cache_tokens=needed if self.cache_tokens is None else self.cache_tokens, mask_id=self.params.mask_id,
            max_eos_ids=max(EngineConfig.max_eos_ids, len(self.params.eos_ids or ())), max_waiting=requests,
        )  # fmt: skip

    # likelihood

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[(bound, is greedy)] of ((context, continuation), context ids, continuation ids); TemplateLM.loglikelihood
        makes these from texts. Contexts that are too long are cut on the left; (-inf, False) where there is no bound.
        Raises ValueError before the first forward."""
        from lm_eval.models.utils import maybe_truncate

        lengths = [len(answer) for _, _, answer in requests]
        wrong = [f"request {i} has {n}" for i, n in enumerate(lengths) if not 0 < n < self.max_length]
        if wrong:
            raise ValueError(f"continuation: expected 1..{self.max_length - 1} tokens, {', '.join(wrong)}")
        pairs = [(maybe_truncate(context, len(answer), self.max_length)[0], answer) for _, context, answer in requests]
        work = [
            (prompt, replace(self.params, gen_length=len(answer), temperature=0.0, eos_early_stop=True), {})
            for prompt, answer in pairs
        ]
        names, outputs = [repr("".join(key)[-60:]) for key, _, _ in requests], [None] * len(work)
        for place, output in self._run(work, names, "Decoding greedily", disable_tqdm):
            outputs[place] = output
        results = []
        bar = tqdm(pairs, desc="Running loglikelihood requests", disable=disable_tqdm or self.rank != 0)
        for place, (prompt, answer) in enumerate(bar):
            bound, output = self._bound(prompt, answer), outputs[place]
            error = output.error
            if math.isnan(bound):
                bound, error = -math.inf, f"request {place} ({names[place]}): the bound is NaN"
            results.append((bound, error is None and output.token_ids == answer))
            if error:
                self._report(error)
            else:
                self.cache_hook.add_partial("loglikelihood", requests[place][0], results[-1])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Bounds of whole texts, each behind an end token, in windows where they are longer than the model; -inf where
        there is none."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        results = []
        bar = tqdm(requests, desc="Running loglikelihood_rolling requests", disable=disable_tqdm or self.rank != 0)
        for place, request in enumerate(bar):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length - 1, context_len=1)
            bound = sum((self._bound(*make_disjoint_window(window)) for window in windows), 0.0)
            if math.isnan(bound):
                self._report(f"request {place} ({_document(request)}): the bound is NaN")
                results.append(-math.inf)
                continue
            results.append(bound)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, bound)
        return results

    def _bound(self, prompt, continuation):
        return likelihood_bound(
            self.model, prompt, continuation, self.mask_id, self.params.block_length, self.mc_num, self.mc_seed,
            self.batch_size, self.params.attend_tail,
        )  # fmt: skip


def _document(request):
    """What lm-eval asks about, in words."""
    return f"task {request.task_name}, document {request.doc_id}"


def _known(what, given, allowed):
    unknown = sorted(given.keys() - set(allowed))
    if unknown:
        raise ValueError(f"{what}: unknown {', '.join(unknown)}; expected some of {', '.join(allowed)}")


def _integer(name, value, low):
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r:.80}: expected an integer >= {low}")
    return value


def _batch_size(size, most):
    """Rows of an engine, from lm-eval's spellings: 8, "8", "auto", "auto:4" (which asks it to find out again)."""
    if isinstance(size, str) and size.partition(":")[0] == "auto":
        return EngineConfig.max_num_seqs if most is None else _integer("max_batch_size", most, 1)
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    return _integer("batch_size", size, 1)


if __name__ == "__main__":
    main()

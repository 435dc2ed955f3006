"""lm-eval, the Language Model Evaluation Harness (0.4.13), with our engine behind its own command line:

    python -m llada2_fast.adapters.lm_eval run --model llada2_fast --model_args pretrained=FOLDER,threshold=0.9 \\
        --apply_chat_template --tasks gsm8k

lm-eval finds no models by entry point, so this registers one and goes on as `lm-eval` itself. Without `pretrained` it
is the embedded model, and `--tasks llada2_demo` scores it on the prompts of `python -m benchmarks.quality`.

Log-likelihoods are lower bounds under block diffusion (likelihood.py has the definition), the same for the same
`mc_num` and `mc_seed`; a continuation counts as greedy if greedy decoding, by the rule of the model_args, writes it.
"""

import sys
from collections import deque
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import demo
from ..config import DTYPES, PRESETS, DecodeParams, EngineConfig, find_device
from ..decoding.inputs import check_fit, resolve_ids
from ..engine import Engine
from ..model import LLaDA2Model
from ..weights import checkpoint
from ..weights.special_tokens import load_tokenizer
from .likelihood import likelihood_bound

MODEL = "llada2_fast"
TASKS = Path(__file__).parent / "lm_eval_tasks"  # found without --include_path
DECODING = tuple(field.name for field in fields(DecodeParams))
NEUTRAL = {"num_beams": 1}  # what tasks say of other models' decoding; any other value is an error


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
        self._engine_config(1)  # its checks
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
        self.tokens = self.forwards = 0

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
        Raises ValueError before the first forward, RuntimeError naming the request that failed.
        """
        work = [self._work(*request.args, place) for place, request in enumerate(requests)]
        texts = [None] * len(work)
        for place, output in self._run(work, "Running generate_until requests", disable_tqdm):
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
        prompt, _ = maybe_truncate(self.tok_encode(context), length, self.max_length)
        # special tokens are no part of the text, so that those among the stops are looked for as ids
        special = {added.content: i for i, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        stops = {"stop": stop, "stop_token_ids": [special[text] for text in stop if text in special]}
        return prompt, params, stops

    def _run(self, work, desc, disable_tqdm):
        """Yields (place in `work`, RequestOutput) as the requests end, batch_size of them in flight."""
        if not work:
            return
        length = self.params.block_length or self.model.block_length
        blocks = sorted(-(-(len(prompt) + params.gen_length) // length) for prompt, params, _ in work)
        engine = Engine(self.model, self._engine_config(sum(blocks[-self.batch_size :]) * length), self.tokenizer)
        for prompt, params, _ in work:
            check_fit(self.model.config, [torch.tensor(prompt, dtype=torch.int64, device="cpu")], params)
        waiting = deque(enumerate(work))
        with tqdm(total=len(work), desc=desc, disable=disable_tqdm) as bar:
            while waiting or engine.has_work:
                while waiting and engine.scheduler.has_room:
                    place, (prompt, params, stops) = waiting.popleft()
                    engine.add_request(prompt, params, request_id=place, **stops)
                for event in engine.step():
                    if event.kind == "finish":
                        if event.output.error:
                            raise RuntimeError(event.output.error)
                        yield event.request_id, event.output
                        bar.update()

    def _engine_config(self, needed):
        return EngineConfig(
            block_length=self.params.block_length, max_num_seqs=self.batch_size, trace=False, graphs=self.graphs,
            cache_tokens=needed if self.cache_tokens is None else self.cache_tokens, mask_id=self.params.mask_id,
            max_eos_ids=max(EngineConfig.max_eos_ids, len(self.params.eos_ids or ())),
        )  # fmt: skip

    # likelihood

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[(bound, is greedy)] of ((context, continuation), context ids, continuation ids); TemplateLM.loglikelihood
        makes these from texts. Contexts that are too long are cut on the left."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        greedy = [False] * len(pairs)
        work = [
            (prompt, replace(self.params, gen_length=len(answer), temperature=0.0, eos_early_stop=True), {})
            for prompt, answer in pairs
        ]
        for place, output in self._run(work, "Decoding greedily", disable_tqdm):
            greedy[place] = output.token_ids == pairs[place][1]
        results = []
        bar = tqdm(pairs, desc="Running loglikelihood requests", disable=disable_tqdm)
        for (key, _, _), pair, is_greedy in zip(requests, bar, greedy, strict=True):
            results.append((self._bound(*pair), is_greedy))
            self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Bounds of whole texts, each behind an end token, in windows where they are longer than the model."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        results = []
        for request in tqdm(requests, desc="Running loglikelihood_rolling requests", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length - 1, context_len=1)
            results.append(sum((self._bound(*make_disjoint_window(window)) for window in windows), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _fit(self, context, continuation):
        from lm_eval.models.utils import maybe_truncate

        if not 0 < len(continuation) < self.max_length:
            raise ValueError(f"continuation: {len(continuation)} tokens, expected 1..{self.max_length - 1}")
        return maybe_truncate(context, len(continuation), self.max_length)[0], continuation

    def _bound(self, prompt, continuation):
        return likelihood_bound(
            self.model, prompt, continuation, self.mask_id, self.params.block_length, self.mc_num, self.mc_seed,
            self.batch_size, self.params.attend_tail,
        )  # fmt: skip


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

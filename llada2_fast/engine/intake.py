"""What a request brings -> a Request that nothing has been done for yet, or an error that names what cannot be."""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from ..config import MAX_SAMPLES, DecodeParams, RequestOptions, as_int
from ..decoding.forms import Form, canvases, forms_of
from ..decoding.inputs import (
    check_fit,
    resolve_ids,
    row_seed,
    row_seeds,
    special_ids,
    split_prompts,
    warn_of_editing,
)
from ..decoding.rules import row_rule
from ..decoding.sequence import Sequence
from ..decoding.window import check_size
from ..structured import TokenAutomaton, automaton_of, known_as
from .detokenizer import IncrementalDetokenizer
from .request import Entry, Request


class Intake:
    """Checks by a model, a config and the size of a cache. Nothing here changes an engine.

    model: LLaDA2Model.
    config: EngineConfig.
    tokenizer: None = there is no text.
    clock: seconds.
    num_pages: of the cache.
    most_tokens: of a window.
    """

    def __init__(self, model, config, tokenizer, clock, num_pages: int, most_tokens: int):
        self.model, self.config, self.tokenizer, self.clock = model, config, tokenizer, clock
        self.num_pages, self.most_tokens = num_pages, most_tokens
        self.block_length = config.block_length or model.block_length
        self.mask_id = resolve_ids(model, DecodeParams(mask_id=config.mask_id, eos_ids=()))[0]
        self.ids = special_ids(model.config, self.mask_id)
        self.home = object()  # what requests of this engine are known by
        self._arrivals = 0

    def prompt(self, prompt_ids, params, options):
        """A prompt in any accepted form as int64 [n]. What is too long is refused before it is copied."""
        size = len(prompt_ids) if isinstance(prompt_ids, SequenceOf) else math.prod(getattr(prompt_ids, "shape", (0,)))
        most = self.model.config.max_position_embeddings
        gen_length = params.gen_length if options.canvas is None else 1  # that of the canvas is looked at later
        if size + gen_length > most:
            raise ValueError(f"gen_length={gen_length}: {size} prompt tokens, but the model has {most} positions")
        prompts = split_prompts([prompt_ids] if isinstance(prompt_ids, SequenceOf) else prompt_ids, name="prompt_ids")
        if len(prompts) != 1:
            raise ValueError(f"prompt_ids: one prompt expected, got {len(prompts)}")
        return prompts[0]

    def request(self, prompt, params, options, number=0, arrived=None, form=None) -> Request:
        """A request that nothing has been done for yet.

        prompt: int64 [n].
        number: what errors call it by.
        arrived: on the clock, None = now.
        form: the Form of params and options, where it is known.
        """
        mask_id, eos_ids, _ = resolve_ids(self.model, params)
        form = self.form(params, options, self.language(params)) if form is None else form
        params = form.params
        special_ids(self.model.config, mask_id, eos_ids)  # no id of two meanings
        check_fit(self.model.config, [prompt], form, number)
        for name, value, own in (
            ("block_length", params.block_length, self.block_length), ("mask_id", mask_id, self.mask_id),
        ):  # fmt: skip
            if value not in (None, own):
                raise ValueError(f"{name}={value!r:.80}: expected {own}, the engine's, or None")
        if len(eos_ids) > self.config.max_eos_ids:
            raise ValueError(f"eos_ids={eos_ids!r:.80}: expected at most max_eos_ids={self.config.max_eos_ids} ids")
        if row_rule(params, self.block_length).max_steps == 0:
            raise ValueError(
                f"minimal_topk={params.minimal_topk}: expected at most gen_length={params.gen_length} under "
                f"profile='hf-2.0', which takes no step otherwise"
            )
        self._check_options(options)
        warn_of_editing(self.model, params)
        traced = self.config.trace if options.trace is None else options.trace
        seed = row_seeds(params.seed, None, 1, params.draws)[0]
        sequence = Sequence(
            prompt.tolist(), params, seed, eos_ids, self.block_length, self.ids, traced, detailed=True,
            min_tokens=options.min_tokens, top_logprobs=options.top_logprobs, canvas=form.canvas,
            automaton=form.automaton,
        )  # fmt: skip
        check_size(sequence, self.most_tokens)
        if sequence.num_pages > self.num_pages:
            also = f" and edit_window={params.edit_window}" if params.edit_window else ""
            also += f" and policy={params.policy!r}" if params.checks else ""
            raise ValueError(
                f"gen_length={params.gen_length}: with the {len(prompt)} tokens of prompt {number}{also} "
                f"{sequence.num_pages} pages of {self.block_length} tokens are needed, the whole cache has "
                f"{self.num_pages} (cache_tokens)"
            )
        self._arrivals += 1
        name, arrived = options.request_id, self.clock() if arrived is None else arrived
        if name is None:
            name = f"request-{self._arrivals}"
        host_ends = options.min_tokens and params.eos_early_stop  # the device knows no least number of tokens
        return Request(
            name, sequence, options, (arrived - options.priority * self.config.priority_s, self._arrivals), arrived,
            frozenset((*options.stop_token_ids, *(eos_ids if host_ends else ()))),
            [Entry(None, sequence.mark(), self._detokenizer(options))], self.home,
        )  # fmt: skip

    def form(self, params, options, automaton) -> Form:
        """The form of a request's answer. automaton: of the language that params ask for."""
        if params.language is not None and options.min_tokens:
            raise ValueError(f"min_tokens={options.min_tokens}: expected 0, since {params.language} says what may end")
        vocab_size = self.model.config.vocab_size
        (form,) = forms_of(params, options.canvas, 1, self.tokenizer, self.mask_id, vocab_size, automaton)
        return form

    def language(self, params) -> TokenAutomaton | None:
        """Of the answers that params ask for. It may take seconds where it is new, in any thread."""
        return automaton_of(params, *self._of_languages(params))

    def known_as(self, params):
        """(what the language is known by, whether it is known) of the answers that params ask for."""
        return known_as(params, *self._of_languages(params))

    def _of_languages(self, params):
        eos_ids, vocab_size = resolve_ids(self.model, params)[1], self.model.config.vocab_size
        return self.tokenizer, eos_ids, self.mask_id, vocab_size, self.config.max_states

    def _check_options(self, options):
        """ValueError for what needs another model, or a tokenizer."""
        known = self.model.config.vocab_size
        for token in options.stop_token_ids:
            if not 0 <= token < known:
                raise ValueError(f"stop_token_ids={token}: expected ids in 0..{known - 1}")
        if options.top_logprobs > known:
            raise ValueError(f"top_logprobs={options.top_logprobs}: expected at most {known}, all tokens there are")
        if options.stop and self.tokenizer is None:
            raise ValueError(f"stop={options.stop!r:.80}: stop strings need an Engine with a tokenizer")

    def _detokenizer(self, options):
        if self.tokenizer is None:
            return None
        return IncrementalDetokenizer(self.tokenizer, options.stop, options.include_stop, options.skip_special_tokens)

    def batch(self, prompts, params, n, stop, stop_token_ids, options) -> list[Request]:
        """Arguments as of Engine.generate."""
        if not (isinstance(prompts, (list, tuple)) and not prompts):
            prompts = split_prompts(prompts, name="prompts")
        count, n = len(prompts), as_int("n", n, 1, MAX_SAMPLES)
        each = zip(
            prompts, self._params_of_each(params, count), _of_each("stop", stop, count),
            _of_each("stop_token_ids", stop_token_ids, count), canvases(options.pop("canvas", None), count),
            strict=True,
        )  # fmt: skip
        if n * count > 1 and options.get("request_id") is not None:
            raise ValueError(f"request_id={options['request_id']!r:.80}: expected None for {n * count} requests")
        requests = []
        for number, (prompt, own, stops, ids, canvas) in enumerate(each):
            checked = RequestOptions(stop=stops, stop_token_ids=ids, canvas=canvas, **options)
            first = 0 if isinstance(params, (list, tuple)) else number * n
            requests += [self.request(prompt, sample(own, first + i), checked, number) for i in range(n)]
        return requests

    @staticmethod
    def _params_of_each(params, count):
        several = isinstance(params, (list, tuple))
        each = list(params) if several else [params] * count
        if len(each) != count or not all(isinstance(one, DecodeParams) for one in each):
            raise ValueError(f"params={params!r:.80}: expected DecodeParams, or one for each of {count} prompts")
        return each


def sample(params, number):
    """The params of one of several requests: its seed is mixed with its number."""
    return params if params.seed is None or number == 0 else replace(params, seed=row_seed(params.seed, number))


def _of_each(name, value, count):
    """An option of each of several prompts, from one for all or a list with those of each."""
    nested = isinstance(value, (list, tuple)) and any(isinstance(one, (list, tuple, set, frozenset)) for one in value)
    if not nested:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}={value!r:.80}: expected those of {count} prompts, got {len(value)}")
    return value

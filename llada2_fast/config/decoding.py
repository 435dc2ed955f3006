"""DecodeParams: how one request is decoded."""

from dataclasses import dataclass
from typing import NamedTuple

from .checks import (
    FLOAT32,
    INT64,
    as_flag,
    as_float,
    as_float32,
    as_ids,
    as_int,
    as_positive32,
    bad,
    check,
    choice,
    described,
    doc,
    put,
)
from .languages import LANGUAGES, as_choices, as_pattern, as_schema

SAMPLING_METHODS = ("auto", "greedy", "multinomial")
POLICIES = ("threshold", "entropy", "self_speculative")
CHECK_PAGES = 2  # that a draft's check needs: of the draft, and of the masks beside it
ENTROPY_BOUND = 0.3  # nats, where none is given


class Profile(NamedTuple):
    """What a profile says of DecodeParams' fields and of answers. Its rules of decoding are in decoding/rules.py.

    edits: an editing_threshold may be given.
    editing_threshold: what it is where none is given.
    card: a model card's, which stops at EOS only where it is asked to.
    needs_tail: attend_tail must be on.
    padded: generate() fills answers up to gen_length; else up to the longest one.
    cuts_canvas: an early return is cut at the first EOS of prompt and tail, too.
    levenshtein: with editing it deletes and inserts where the checkpoint is a LLaDA2.2 one.
    only_levenshtein: it is for such checkpoints alone, and draws nothing.
    plain: a LLaDA2.2 checkpoint is decoded as a LLaDA2.1 one, its special ids are ids like others.
    shapes: an answer may be in a language or have a canvas: masks are never committed, nor ends of answers undone.
    windows: an edit_window may be given.
    policies: a policy may be given.
    """

    edits: bool = True
    editing_threshold: float | None = None
    card: bool = False
    needs_tail: bool = True
    padded: bool = False
    cuts_canvas: bool = False
    levenshtein: bool = False
    only_levenshtein: bool = False
    plain: bool = False
    shapes: bool = True
    windows: bool = False
    policies: bool = False


PROFILES = {
    "default": Profile(needs_tail=False, padded=True, levenshtein=True, windows=True, policies=True),
    "hf-2.0": Profile(edits=False, card=True, cuts_canvas=True, shapes=False),
    "hf-2.1": Profile(editing_threshold=0.9, card=True, plain=True, shapes=False),
    "sglang-lowconf": Profile(edits=False),
    "sglang-joint": Profile(editing_threshold=0.0, windows=True),
    "sglang-indel": Profile(editing_threshold=0.0, levenshtein=True, only_levenshtein=True, shapes=False),
    "diffusers": Profile(needs_tail=False, padded=True),
}
PRESETS = {  # the modes of the LLaDA2.1 model card
    "quality": {"threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16},
    "speed": {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16},
}


@described
@dataclass(frozen=True)
class DecodeParams:
    """How one request is decoded; ValueError naming field, value and what is allowed.

    Defaults are those of the LLaDA2.1 card's generate(), but editing is off. Thresholds are strict and may exceed 1,
    which is never reached. A drawn token's confidence is what the model itself gives it, its probability at temperature
    1 among all tokens, so that thresholds mean the same at any temperature, top_k and top_p; under the other profiles
    it is the probability of the draw, as on the cards and in diffusers: near 1 at a low temperature or with narrow
    filters, where whole blocks are committed at once. In a language all of this is among the tokens that may stand at a
    position; where that is one alone, it is committed whatever the threshold.
    """

    gen_length: int = doc(2048, "most tokens to generate")
    block_length: int | None = doc(None, "tokens of a diffusion block; the checkpoint's unless given")
    steps: int = doc(32, "steps over which a block's quota of commits is spread; not read under the sglang profiles")
    temperature: float = doc(0.0, "of the draws; 0 = greedy")
    top_k: int | None = doc(None, "draw among the k likeliest tokens; off unless given, or 0")
    top_p: float | None = doc(None, "draw among the likeliest tokens of this mass; off unless given, or from 1 on")
    sampling_method: str = doc("auto", "auto, greedy (whatever the temperature) or multinomial")
    threshold: float = doc(
        0.95, "commit tokens with a confidence above this; above 1 by quota alone; not read under another policy"
    )
    editing_threshold: float | None = doc(
        None,
        "replace committed tokens by others with a confidence above this, and delete and insert some where the "
        "checkpoint is a LLaDA2.2 one; off unless given, but 0.9 under hf-2.1 and 0.0 under sglang-joint and "
        "sglang-indel",
    )
    max_post_steps: int = doc(16, "most editing steps of a block without masks of its own")
    minimal_topk: int = doc(1, "least tokens to commit per step, but for a check's; not read under the sglang profiles")
    num_to_transfer: int = doc(1, "least tokens to commit per step under profile hf-2.1, and of no use elsewhere")
    eos_early_stop: bool = doc(False, "stop at the first end token")
    eos_ids: tuple[int, ...] | None = doc(
        None, "end tokens, several or none; the checkpoint's unless given; an id outside the vocabulary never occurs"
    )
    mask_id: int | None = doc(None, "the mask token; the checkpoint's unless given")
    pad_id: int | None = doc(None, "the padding token; the checkpoint's unless given")
    seed: int | None = doc(None, "of the draws, an int64; drawn itself unless given")
    attend_tail: bool = doc(True, "denoise the last block whole, also behind gen_length")
    profile: str = doc(
        "default", "whose rules: default, hf-2.0, hf-2.1, sglang-lowconf, sglang-joint, sglang-indel or diffusers"
    )
    regex: str | None = doc(
        None, "a regular expression, in the syntax of Rust's regex crate, that the whole text of the answer matches"
    )
    json_schema: dict | None = doc(None, "a JSON schema that the answer, a JSON text, is valid by", hash=False)
    choices: tuple[str, ...] | None = doc(None, "texts of which the answer is one")
    edit_window: int = doc(
        0,
        "finished blocks that stay revisable: with each block that ends so many before it are edited again, in one "
        "forward that sees them whole, of at most 512 tokens on a CPU and 4096 on a GPU, or an engine's "
        "max_num_batched_tokens if that is more; 0 = off, needs editing_threshold",
    )
    policy: str = doc(
        "threshold",
        "what a step commits: threshold, the confident tokens; entropy, the most certain ones as long as those ahead "
        "of each are certain together; self_speculative, the block, or the end of the answer, if that much is certain, "
        "else what the model with block size 1 would say as far as the draft agrees, in a further forward of twice the "
        "positions",
    )
    entropy_bound: float | None = doc(
        None,
        "of the policies entropy and self_speculative: what the entropies of the tokens ahead of one, in nats, may "
        f"add up to; {ENTROPY_BOUND} unless given",
    )
    entropy_decay: float = doc(
        1.0, "of the same: an entropy counts this much less with each further position between the two; 1 = in full"
    )

    def __post_init__(self):
        for name in ("gen_length", "steps", "minimal_topk", "num_to_transfer"):
            check(self, name, as_int, 1)
        for name in ("max_post_steps", "edit_window"):
            check(self, name, as_int, 0)
        for name, low in (("block_length", 1), ("top_k", 0), ("mask_id", 0), ("pad_id", 0)):
            if getattr(self, name) is not None:
                check(self, name, as_int, low)
        put(self, "top_k", self.top_k or None)
        check(self, "temperature", as_float, f">= 0 and at most {FLOAT32.max:.4g}", lambda x: 0 <= x <= FLOAT32.max)
        put(self, "temperature", as_positive32(self.temperature))
        check(self, "threshold", as_float, ">= 0", lambda x: x >= 0)
        put(self, "threshold", as_float32(self.threshold))
        if self.editing_threshold is not None:
            check(self, "editing_threshold", as_float, ">= 0, or None for off", lambda x: x >= 0)
            put(self, "editing_threshold", as_float32(self.editing_threshold))
        if self.top_p is not None:
            check(self, "top_p", as_float, "above 0, or None for off", lambda x: x > 0)
            put(self, "top_p", self.top_p if self.top_p < 1 else None)
        for name in ("eos_early_stop", "attend_tail"):
            check(self, name, as_flag)
        if self.eos_ids is not None:
            put(self, "eos_ids", as_ids("eos_ids", self.eos_ids))
        if self.seed is not None:
            check(self, "seed", as_int, -INT64, INT64 - 1)
        check(self, "sampling_method", choice, SAMPLING_METHODS)
        check(self, "profile", choice, tuple(PROFILES))
        check(self, "policy", choice, POLICIES)
        if self.entropy_bound is not None:
            check(self, "entropy_bound", as_float, ">= 0, or None", lambda x: x >= 0)
            put(self, "entropy_bound", as_float32(self.entropy_bound))
        check(self, "entropy_decay", as_float, "above 0 and at most 1", lambda x: 0 < x <= 1)
        put(self, "entropy_decay", as_positive32(self.entropy_decay))
        for name, normalised in (("regex", as_pattern), ("json_schema", as_schema), ("choices", as_choices)):
            if getattr(self, name) is not None:
                check(self, name, normalised)
        self._check_profile()

    @property
    def language(self) -> str | None:
        """The field that says what the answer's text is: regex, json_schema or choices; None if it may be anything."""
        return next((name for name in LANGUAGES if getattr(self, name) is not None), None)

    @property
    def draws(self) -> bool:
        """Tokens are drawn at random, not the most likely ones."""
        return self.temperature > 0 and self.sampling_method != "greedy"

    @property
    def checks(self) -> bool:
        """What a step drafts is checked, by a forward of its own, unless it fills its block."""
        return self.policy == "self_speculative"

    @property
    def filters(self) -> bool:
        """Tokens are drawn with top-k or top-p, which costs a launch on a GPU."""
        return self.top_k is not None or self.top_p is not None

    @classmethod
    def preset(cls, name, **changes) -> "DecodeParams":
        """One of PRESETS, "quality" or "speed", with other fields as given."""
        return cls(**PRESETS[choice("preset", name, tuple(PRESETS))] | changes)

    @property
    def traits(self) -> Profile:
        """What its profile says."""
        return PROFILES[self.profile]

    def _check_profile(self):
        name, profile = self.profile, self.traits
        if self.num_to_transfer != 1 and name != "hf-2.1":
            raise bad("num_to_transfer", self.num_to_transfer, f"1 outside profile='hf-2.1', not {name!r}")
        if profile.needs_tail and not self.attend_tail:
            raise bad("attend_tail", self.attend_tail, f"True under profile={name!r}")
        if not profile.edits and self.editing_threshold is not None:
            raise bad("editing_threshold", self.editing_threshold, f"None under profile={name!r}, which has no editing")
        given = [name for name in LANGUAGES if getattr(self, name) is not None]
        if len(given) > 1:
            raise bad(given[1], getattr(self, given[1]), f"one of {', '.join(LANGUAGES)}, and {given[0]} is there")
        if given and not profile.shapes:
            raise bad(given[0], getattr(self, given[0]), f"none under profile={name!r}, which may leave masks or move")
        if profile.only_levenshtein and self.draws:
            raise bad("temperature", self.temperature, f"0 under profile={name!r}, which draws nothing")
        if self.editing_threshold is None:
            put(self, "editing_threshold", profile.editing_threshold)
        if self.edit_window:
            self._check_window(given)
        self._check_policy(given)

    def _check_window(self, languages):
        if not self.traits.windows:
            raise bad("edit_window", self.edit_window, f"0 under profile={self.profile!r}, whose rules have none")
        if self.editing_threshold is None:
            raise bad("edit_window", self.edit_window, "0 without an editing_threshold")
        if languages:
            raise bad("edit_window", self.edit_window, f"0 with {languages[0]}, whose texts are not edited afterwards")

    def _check_policy(self, languages):
        if self.policy == "threshold":
            if self.entropy_bound is not None:
                raise bad("entropy_bound", self.entropy_bound, "None under policy='threshold', which has none")
            if self.entropy_decay != 1:
                raise bad("entropy_decay", self.entropy_decay, "1 under policy='threshold', which reads none")
            return
        if not self.traits.policies:
            raise bad("policy", self.policy, f"'threshold' under profile={self.profile!r}, whose rule it is")
        if languages:
            raise bad("policy", self.policy, f"'threshold' with {languages[0]}, whose tokens the host chooses")
        if self.checks:
            if self.draws:
                raise bad("policy", self.policy, f"another one with temperature={self.temperature:g}: it draws nothing")
            if self.editing_threshold is not None:
                raise bad("policy", self.policy, "another one with an editing_threshold: what is checked stays")

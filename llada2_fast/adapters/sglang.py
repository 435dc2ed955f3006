"""SGLang serves LLaDA2 with our refinement step, once this package is installed beside it:

    sglang serve --model-path inclusionAI/LLaDA2.1-mini --dllm-algorithm LLaDA2Fast --dllm-algorithm-config x.yaml

SGLang calls `register` in each of its processes (entry point group sglang.srt.plugins; SGLANG_PLUGINS=llada2_fast loads
no other) and keeps its network, its cache and its scheduler; both its loops work: first-done-first-out, its default,
and synchronous (--no-dllm-fdfo). Written against SGLang 0.5.23; any other version stays as it is and logs one line.
x.yaml, where each key may be left out:

    profile: sglang-joint       # or sglang-lowconf, the default where no key of editing is given, or default
    threshold: 0.5              # in sglang-joint; 0.95 elsewhere
    edit_threshold: 0           # sglang-joint and default, as are the next three (default: no editing without it)
    max_post_edit_steps: 16
    penalty_lambda: 0           # sglang-joint only: taken off the logit of the token on a position's left
    vectorized_decoding: true   # sglang-joint only: accepted, without effect
    steps: 32                   # default only, as is the next
    minimal_topk: 1
    sampling_method: auto       # greedy: whatever requests ask for, as SGLang's own algorithms do
    seed: 0                     # of requests without a seed of their own
    block_size: 32              # read by SGLang

Unlike SGLang's algorithms ours honours a request's temperature, top_k and top_p, and SGLang's temperature is 1 where
neither request nor checkpoint says otherwise: ask for temperature 0, or say `sampling_method: greedy`. Confidence is
then the probability of the drawn token in the filtered distribution, under profile default that in the model's own.
A request's sampling_seed counts under --enable-deterministic-inference; without it SGLang does not pass seeds on, and a
request that draws with one is refused. Other differences from LowConfidence and JointThreshold, all of them on purpose:

- The mask token is never a candidate: every step with masks left fills one, so no block can keep a server busy for
  ever, and no text holds a mask. Elsewhere tokens and done flags are SGLang's.
- Of equally confident positions the lowest is filled, of equally likely tokens the lowest id.
- A request whose logits hold NaN or infinity ends with SGLang's "NaN happened"; the others go on.
"""

import logging
from dataclasses import dataclass

import torch

from ..config import DecodeParams
from ..decoding.inputs import EDIT_IDS
from ..decoding.rules import batch_params, refuse_checks, row_rule
from ..kernels import refine
from ..kernels.refine import BlockState, SpecialIds, refine_step
from .versions import Host

NAME = "LLaDA2Fast"
HOST = Host("SGLang", "0.5.23")
_logger = logging.getLogger(__name__)

# SGLang's spelling of DecodeParams' fields; both are accepted.
_SPELLED = {"edit_threshold": "editing_threshold", "max_post_edit_steps": "max_post_steps"}
_EDITING = {"editing_threshold", "max_post_steps"}
_JOINT = {"penalty_lambda", "vectorized_decoding"}
_COMMON = {"profile", "threshold", "sampling_method", "seed", "block_size"}
_KEYS = {  # profile -> the keys it reads
    "sglang-lowconf": _COMMON,
    "sglang-joint": _COMMON | _EDITING | _JOINT,
    "default": _COMMON | _EDITING | {"steps", "minimal_topk", "policy", "entropy_bound", "entropy_decay"},
}

# What a request may not ask for, and the values by which it does not; of req.sampling_params and of req itself.
_NO_SAMPLING = {
    "min_p": (0,), "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
    "min_new_tokens": (0,), "beam_width": (None, 1), "logit_bias": (None, {}), "json_schema": (None,),
    "regex": (None,), "ebnf": (None,), "structural_tag": (None,), "watermark": (None,),
}  # fmt: skip
_NO_OUTPUT = (
    "return_logprob", "return_flat_raw_top_logprobs", "return_sampling_mask", "return_hidden_states",
    "custom_logit_processor",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the YAML file says, checked. penalty: taken off the logit of a position's left neighbour's token."""

    params: DecodeParams
    penalty: float = 0.0

    @classmethod
    def read(cls, config, block_size):
        """config: the file's mapping. ValueError naming key, value and what is allowed."""
        given = {}
        for key, value in config.items():
            name = _SPELLED.get(key, key)
            if name in given:
                raise ValueError(f"{key}={value!r:.80}: {name}={given[name]!r:.80} says the same; give one of them")
            given[name] = value
        joint = given.keys() & (_EDITING | _JOINT)
        profile = given.setdefault("profile", "sglang-joint" if joint else "sglang-lowconf")
        if not isinstance(profile, str) or profile not in _KEYS:
            raise ValueError(f"profile={profile!r:.80}: expected one of {', '.join(_KEYS)}")
        for key in given.keys() - _KEYS[profile]:
            allowed = ", ".join(sorted(_KEYS[profile]))
            raise ValueError(
                f"{key}={given[key]!r:.80}: profile={profile!r:.80} has no such key; expected some of {allowed}"
            )
        penalty, ignored = given.pop("penalty_lambda", 0), given.pop("vectorized_decoding", True)
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
            raise ValueError(f"penalty_lambda={penalty!r:.80}: expected a number >= 0")
        if not isinstance(ignored, bool):
            raise ValueError(f"vectorized_decoding={ignored!r:.80}: expected true or false")
        if given.setdefault("seed", 0) is None:
            raise ValueError("seed=None: expected an integer")
        if profile == "sglang-joint":
            given.setdefault("threshold", 0.5)
        given.pop("block_size", None)
        params = DecodeParams(block_length=block_size, **given)
        refuse_checks(params)
        return cls(params, float(penalty))


@dataclass(eq=False)
class Block:
    """What SGLang carries from step to step for a request's active block."""

    kind: torch.Tensor  # int8 [L]: PROMPT or GENERATED
    seed: int
    step: int = 0
    post_steps: int = 0
    frozen: int = 0  # BLOCK_DONE | ERROR


class Refinement:
    """The algorithm, to be mixed into SGLang's DllmAlgorithm, which owns the loops."""

    supported_architectures = ("LLaDA2MoeModelLM",)

    def __init__(self, config):
        super().__init__(config)
        self.settings = Settings.read(config.algorithm_config, config.block_size)
        self.rule = row_rule(self.settings.params, config.block_size)
        # every rank of a tensor-parallel group draws the same seeds
        self._generator = torch.Generator().manual_seed(self.settings.params.seed)
        self._batch = [], None, None, False

    @classmethod
    def configure_server_args(cls, server_args):
        """ValueError for a LLaDA2.2 checkpoint."""
        from sglang.srt.arg_groups.model_override_base import model_config_of

        config = model_config_of(server_args).hf_config
        edits = [name for name in EDIT_IDS if getattr(config, name, None) is not None]
        if edits:
            raise ValueError(
                f"--dllm-algorithm {NAME}: the checkpoint has {' and '.join(edits)} (LLaDA2.2), but SGLang moves no "
                "state of ours; expected JointThresholdInDel, or a checkpoint without them"
            )

    @classmethod
    def validate_request(cls, req):
        """A text naming what the request asks for and cannot have, or None."""
        asked, config = req.sampling_params, req.dllm_config.algorithm_config
        refused = [name for name, off in _NO_SAMPLING.items() if getattr(asked, name) not in off]
        refused += [name for name in _NO_OUTPUT if getattr(req, name)]
        draws = asked.top_k != 1 and config.get("sampling_method") != "greedy"
        if asked.sampling_seed is not None and draws and not _deterministic():
            refused.append("sampling_seed without --enable-deterministic-inference")
        return f"{NAME} does not support {', '.join(refused)}" if refused else None

    def init_step_state(self, forward_batch):
        """One Block per row. What stands in a block at its start is prompt, or committed."""
        kind = self._prompt_mask(forward_batch).to(torch.int8) * refine.PROMPT
        seeds = torch.randint(-(2**63), 2**63 - 1, (len(kind),), generator=self._generator, device="cpu")
        return [Block(*row) for row in zip(kind.unbind(), seeds.tolist(), strict=True)]

    def max_steps(self, block_size):
        """Steps that fill masks one by one, mask-free ones, and one that finds nothing left to do."""
        return block_size + (self.settings.params.max_post_steps if self._editing else 0) + 1

    def step(self, forward_batch, full_logits, states):
        """One refinement step of every row, in place in forward_batch.input_ids; one host sync.

        full_logits: [B * L, V]; penalty_lambda, where given, is taken off them in place. states: one Block per row.
        Returns one bool per row: its block has ended and the forward before this step has seen its last tokens.
        """
        rows, length = len(states), self.block_size
        logits = full_logits.view(rows, length, -1)
        tokens = forward_batch.input_ids.view(rows, length)
        if self.settings.penalty:
            left = tokens[:, :-1, None]
            logits[:, 1:].scatter_add_(2, left, logits.new_full(left.shape, -self.settings.penalty))
        state, params, filters = self._gather(forward_batch, states)
        state.tokens = tokens
        output = refine_step(logits, state, params, SpecialIds(self.mask_id), filters=filters, only_needed=True)
        done = []
        for block, row in zip(states, output.status.tolist(), strict=True):
            block.step, block.post_steps = row[refine.STEP], row[refine.POST_STEPS]
            block.frozen = row[refine.FLAGS] & ~refine.CHANGED
            done.append(bool(block.frozen) and not row[refine.FLAGS] & refine.CHANGED)
        failed = [bool(block.frozen & refine.ERROR) for block in states]
        if any(failed) and (self.fdfo or all(done)):  # no forward will read these tokens
            _logger.error("logits hold NaN or infinity: %d of %d requests fail", sum(failed), rows)
            fails = torch.tensor(failed, dtype=torch.bool, device=tokens.device)[:, None]
            tokens.masked_fill_(fails & (state.kind != refine.PROMPT), -1)  # an id below 0 is how SGLang learns of it
        return done

    @property
    def _editing(self):
        return bool(self.rule.flags & refine.EDITING)

    def _gather(self, forward_batch, blocks):
        """BlockState without tokens, RefineParams, filters; those of the last step if its blocks step again."""
        last, *batch = self._batch
        if len(last) != len(blocks) or any(a is not b for a, b in zip(last, blocks, strict=True)):
            batch = self._arrange(forward_batch, blocks)
            self._batch = list(blocks), *batch
        return batch

    def _arrange(self, forward_batch, blocks):
        rows, device = len(blocks), forward_batch.input_ids.device
        kind = torch.stack([block.kind for block in blocks])
        counts = [[getattr(block, name) for block in blocks] for name in ("step", "post_steps", "frozen")]
        counts = torch.tensor(counts, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
        step, post_steps, frozen = counts.unbind()
        no_eos = [()] * rows  # SGLang looks for them in finished blocks
        params = batch_params([self.rule] * rows, [block.seed for block in blocks], no_eos, device)
        filters = self._sampling(forward_batch.sampling_info, params)
        state = BlockState(
            None, kind, forward_batch.positions.view(rows, -1)[:, 0].to(torch.int64).contiguous(),
            step, post_steps, frozen, prior_flags=torch.zeros_like(frozen),
            commit_step=torch.full_like(kind, -1, dtype=torch.int32),
            commit_confidence=torch.zeros_like(kind, dtype=torch.float32), changed=torch.zeros_like(frozen),
        )  # fmt: skip
        return state, params, filters

    def _sampling(self, info, params):
        """Put the requests' own sampling parameters into params; True if some row draws with top-k or top-p.

        info: SamplingBatchInfo; temperature 0 arrives as temperature 1, top_k 1.
        """
        if info is None or info.is_all_greedy or self.settings.params.sampling_method == "greedy":
            return False
        params.temperature = torch.where(info.top_ks == 1, 0, info.temperatures.view(-1))
        params.top_k, params.top_p = info.top_ks, info.top_ps
        if info.sampling_seed is not None:
            params.seed = info.sampling_seed
        return info.need_top_k_sampling or info.need_top_p_sampling


def _deterministic():
    from sglang.srt.runtime_context import get_exec

    return get_exec().deterministic.enable_deterministic_inference


def register():
    """Make --dllm-algorithm know LLaDA2Fast; doing it again is harmless.

    Beside another version it logs one line, changes nothing and raises nothing. Another version is one that says so, or
    one whose own files raise any Exception while what is needed of them is looked up. What a version served raises
    after that is our fault: raised.
    """
    version = "of an unknown version"
    try:
        from sglang.version import __version__

        version = str(__version__)
        if not HOST.serves(version):
            HOST.stand_back(version)
            return
        from sglang.srt.dllm.algorithm import algo_name_to_cls
        from sglang.srt.dllm.algorithm.base import DllmAlgorithm

        if not isinstance(algo_name_to_cls, dict) or not isinstance(DllmAlgorithm, type):
            raise TypeError("algo_name_to_cls, DllmAlgorithm: expected a dict and a class")
    except Exception as error:  # only SGLang's own code runs in here, and another version's may raise anything
        HOST.stand_back(version, error)
        return
    algo_name_to_cls.setdefault(NAME, type(NAME, (Refinement, DllmAlgorithm), {"__doc__": Refinement.__doc__}))

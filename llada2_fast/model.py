"""The LLaDA2 MoE network.

Two ways through the same layers: `forward` takes whole sequences and an attention mask, without a cache, as the model
cards and diffusers call it; `forward_blocks` takes packed spans of whole blocks and attends over cached pages, as the
decoder calls it. Shapes: B batch, S sequence, T packed tokens, H hidden, V vocab, D head dim, L block_length.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .cache import PagedKVCache
from .config import ModelConfig, as_flag, as_int, habits
from .kernels import _triton
from .kernels._ambient import isolated, lasting
from .kernels.arrivals import counters_at_zero
from .kernels.attention import BlockBatch, Span, block_attention, masked_attention, place_blocks, single_blocks
from .kernels.combine import summed
from .kernels.fp8 import FP8, check_device, linear, unquantised
from .kernels.gemm import SCALE_GROUP, WORDS, Wanted
from .kernels.product import Rows, rows_of
from .kernels.rope import Angles, look_up, rope_angles
from .kernels.router import token_blocks
from .layers import Layer, Linear, RMSNorm
from .masks import block_causal_mask as block_causal_mask
from .masks import whole_mask
from .outputs import Output
from .weights import checkpoint
from .weights.conversion import OnOurDevices
from .weights.shapes import WHOLE, Share
from .weights.special_tokens import release_in, release_of, save_special_ids, special_ids, special_ids_of


@dataclass(eq=False)
class ModelOutput(Output):
    """What `LLaDA2Model.forward` returns.

    logits [B, S, V] float32; hidden_states: embeddings, each layer's output and the final norm, num_layers + 2 tensors
    [B, S, H]; router_indices: per layer [B*S, K] int64 in descending order of choice, None for dense layers.
    """

    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor | None, ...] | None = None


class Read(NamedTuple):
    """Which tokens of a forward over packed blocks have a reader."""

    blocks: list[int]  # ordinals of the blocks that hold any
    rows: torch.Tensor  # int64 [M]: among the tokens of these blocks


def read_nothing(device: torch.device) -> Read:
    """The Read of a forward that only fills pages, on the network's device."""
    return Read([], torch.empty(0, dtype=torch.int64, device=device))


def _attend(k, v, blocks, q, own=slice(None), rows=slice(None)):
    """Attention over pages of the queries [T, nq, D] of `own` tokens; `rows` of the result."""
    return block_attention(q[own], k, v, blocks)[rows]


def seen_block_length(logits: torch.Tensor) -> int | None:
    """The block length with which `forward` made these logits, which may be a slice of them; None: nothing is known."""
    return getattr(_whole(logits), "block_length", None)


def _whole(tensor):
    return tensor if tensor._base is None else tensor._base


def _exist(positions, blocks, length):
    """bool [T]: which of the positions [T] of blocks, a list of Span or a BlockBatch, are positions of their rows."""
    if isinstance(blocks, BlockBatch):
        limit = blocks.limit[blocks.block_row.long()]  # of the last row where it is -1: nobody reads such a block
        if blocks.order is not None:  # the limit of a checked block's row counts the masked one, too
            limit = limit - length * (blocks.order > 0)
    else:
        limits = [span.limit for span in blocks for _ in range(span.num_blocks)]
        limit = torch.tensor(limits, dtype=torch.int64, device=positions.device)
    return (positions.view(-1, length) < limit[:, None]).flatten()


def _longest(spans, length):
    """Positions that the rows of the spans, a list of Span or a BlockBatch, have at most."""
    if isinstance(spans, BlockBatch):
        return spans.page_table.shape[1] * length
    return max((len(span.pages) for span in spans), default=1) * length


class LLaDA2Model(OnOurDevices):
    """The network. `block_length` is the one used where a call names none (config `block_size`, else 32).

    config: what it is.
    dtype: of its weights and activations; fp8 and int4 weights and float32 tensors of routers aside.
    device: where its weights are; "meta" for a network that gets them later.
    share: what it holds of each layer. The layers then give their share of the sum, which nothing here adds up.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, device="cpu", share: Share = WHOLE):
        super().__init__()
        share.check(config)
        kw = {"dtype": dtype, "device": device}
        self.config = config
        self.block_length = config.block_size
        self.special_ids = {}  # what the folder says of mask, eos and pad, see special_tokens.py
        self.release: str | None = None  # "2.0", "2.1" or "2.2", where the checkpoint's name says so
        self._exact, self._fp8 = True, config.fp8
        self._angle_tables = {}
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **kw)
        self.layers = nn.ModuleList(Layer(config, i, share, **kw) for i in range(config.num_hidden_layers))
        fp8_head = config.fp8 and not config.tie_word_embeddings
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, fp8_head, **kw)
        if not config.tie_word_embeddings:
            kind = "fp8" if config.fp8 else None
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantization=kind, **kw)
        self.requires_grad_(False)

    @lasting
    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.word_embeddings.weight.device

    def products(self) -> dict[tuple[int, int, torch.dtype], Rows]:
        """{(N, K, dtype): kernels.product.Rows} of all products on this device with as many threads as now: how each is
        computed, and at which heights a row's bits are the same. Found by a probe, which takes milliseconds a shape."""
        found = {}
        for name, weight in self.named_parameters():
            looked_up = "embeddings" in name and not self.config.tie_word_embeddings
            if weight.ndim < 2 or looked_up or name.endswith("scale"):
                continue
            if weight.dtype == WORDS:  # [.., K / 128, N, 32], multiplied in the model's dtype, whole groups
                groups, rows = weight.shape[-3:-1]
                weight = self.norm.weight.new_empty(1, 1).expand(rows, groups * SCALE_GROUP)
            wide = ".router." in name or weight.dtype == FP8  # multiplied in float32
            dtype = torch.float32 if wide else weight.dtype
            found[(*weight.shape[-2:], dtype)] = rows_of(weight, dtype)
        return found

    @property
    def exact_rows(self) -> bool:
        """Whether a token's bits do not depend on what else is in its batch: then tokens and trace of a request are
        those it gets alone. True on a CPU whose libraries round a row alike at some height, for each product with as
        many threads as now; on a GPU with Triton if `exact`, or where all products are in fp8."""
        if self.device.type != "cpu":
            return _triton.HAS_TRITON and (self.exact or (self._fp8 and not self.config.tie_word_embeddings))
        return all(rows.least is not None for rows in self.products().values())

    @property
    def exact(self) -> bool:
        """Whether a GPU multiplies by our own products alone, which round a row alike at any height: cuBLAS, which
        otherwise does what is not fp8 outside the experts, picks its kernels by the number of rows. By the times of
        its products that costs mini in bfloat16 on an H100 0.2 % of a step of one row and 3 % of one of 32, and of
        4096 tokens of a prompt a fifth of the time of QKV and dense. To be set before anything is decoded: a captured
        graph keeps the products that it has. Nothing changes on a CPU."""
        return self._exact

    @exact.setter
    def exact(self, value: bool):
        self._exact = as_flag("exact", value)
        for module in self.modules():
            if isinstance(module, Linear):
                module.exact = value

    @classmethod
    @lasting
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        progress: bool = True,
        quantization: str | None = None,
        exact: bool = True,
        *,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | dict | None = None,
        **kwargs,
    ) -> "LLaDA2Model":
        """Load a LLaDA2.0/2.1/2.2 checkpoint (safetensors only, no remote code).

        path: its folder, or the id of a hub repository.
        dtype: of the weights, a torch dtype or its name, None or "auto" = the config's; the routers' tensors keep their
            own where it is wider.
        device: where the network goes, None = the CPU, "auto" = the GPU if there is one.
        progress: show a bar.
        quantization: "fp8" turns the linear layers into block-scaled fp8 while they are read, "int4" the experts into
            four bits with a scale for each 128 of K, None = the config's.
        exact: the same bits in any batch on a GPU, too; False may be faster in prefill, see `exact`.
        torch_dtype: another name of dtype.
        device_map: another name of device.
        kwargs: revision, cache_dir, token, local_files_only, force_download of a hub id, subfolder, and what changes
            nothing here (habits.LOADING).
        Raises CheckpointError naming file and tensor, ValueError naming an argument that cannot be honoured.
        """
        hub, exact = habits.loading(kwargs), as_flag("exact", exact)
        dtype, device = habits.find_dtype(dtype, torch_dtype), habits.find_place(device, device_map)
        folder = checkpoint.resolve(path, **hub)
        config = ModelConfig.from_hf(folder)
        if quantization is not None:
            stored, config = config.quantization, replace(config, quantization=quantization)
            if stored not in (None, quantization):
                raise ValueError(f"quantization={quantization!r}: expected None or {stored!r}, in which {folder} is")
        if config.fp8:
            check_device(device)
        if dtype is None:
            dtype = getattr(torch, config.dtype or "bfloat16")
        ids = special_ids(folder, config.vocab_size)
        plan = checkpoint.inspect(folder, config)  # what will be refused is refused before memory is asked for
        model = cls(config, dtype=dtype, device="meta").eval()
        for name, wide in checkpoint.router_dtypes(plan, dtype).items():
            model.get_parameter(name).data = torch.empty_like(model.get_parameter(name), dtype=wide)
        model.to_empty(device=device)
        checkpoint.load(folder, config, dict(model.named_parameters()), progress, plan=plan)
        model.special_ids = ids
        model.release = release_of(folder, path)
        model.exact = exact
        return model

    @classmethod
    @lasting
    def from_transformers(cls, model: nn.Module) -> "LLaDA2Model":
        """The network on the tensors of a LLaDA2 model that is loaded already, e.g. with the checkpoint's remote code.

        Used where they are: embeddings, norms, query_key_value, dense, down projections outside the experts, router and
        LM head. Experts and gate/up pairs, which we stack, are copied, one parameter at a time, and the module's
        tensors become views of the copy: it goes on working, nothing is held twice, and at most one layer's experts are
        while they are copied. Only what is not of the embeddings' dtype stays with the module and is converted for us
        (of the router: what is narrower). Special ids: its generation_config's, else its config's.

        model: its state_dict has a checkpoint's tensor names, its `config` has to_dict().
        Raises CheckpointError naming the tensor as in from_pretrained, ValueError if it is quantised.
        """
        config = ModelConfig.from_hf(model.config.to_dict())
        params = checkpoint.adopt(model, config)
        network = cls(config, params["word_embeddings.weight"].dtype, device="meta").eval()
        network.load_state_dict(params, assign=True)
        network.special_ids = special_ids_of(model, config.vocab_size)
        network.release = release_in(getattr(model.config, "_name_or_path", None))
        return network

    def save_pretrained(
        self,
        path: str | os.PathLike,
        *,
        max_shard_size: int | str | None = "5GB",
        safe_serialization: bool = True,
        **kwargs,
    ) -> None:
        """Write the weights in the checkpoint's own layout, byte-equal, config.json and generation_config.json.

        path: the folder, made if it is not there.
        max_shard_size: bytes of a weight file at most, "5GB" or an int.
        safe_serialization: True, nothing is pickled.
        kwargs: what changes nothing (habits.SAVING).
        Raises ValueError naming any other argument, CheckpointError for a folder that holds another checkpoint.
        """
        habits.saving(safe_serialization=safe_serialization, **kwargs)
        params = dict(self.named_parameters())
        checkpoint.save(path, self.config, params, max_shard_bytes=habits.shard_bytes(max_shard_size))
        save_special_ids(path, self.special_ids)

    @isolated
    def lm_logits(self, hidden: torch.Tensor, wanted: Wanted | None = None) -> torch.Tensor:
        """Logits [..., V] in the model's dtype.

        hidden: [..., H], after the final norm, or its QuantRows.
        wanted: which rows have a reader, None = all; others' logits may be anything.
        """
        if self.config.tie_word_embeddings:
            return linear(hidden, self.word_embeddings.weight, exact=self.exact, wanted=wanted)
        return self.lm_head(hidden, wanted)

    def _angles(self, position):
        c = self.config
        return rope_angles(position, c.rotary_dim, c.rope_theta, c.rope_factor, self.dtype)

    def _angle_table(self, positions):
        """cos and sin [P, rot] of positions 0 .. P - 1, P the next power of two; kept, for CUDA graphs hold them."""
        size = 1 << (positions - 1).bit_length()
        key = size, self.dtype, self.device
        if key not in self._angle_tables:
            self._angle_tables[key] = self._angles(torch.arange(size, device=self.device))
        return self._angle_tables[key]

    @isolated
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        block_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_router_indices: bool = False,
        return_dict: bool | None = True,
        **ignored,
    ) -> ModelOutput | tuple:
        """Logits of whole sequences, without a cache. NumPy's arrays will do for tensors, and lists but for input_ids.

        input_ids: [B, S] int64.
        position_ids: [B or 1, S], None = 0..S-1; of angles only, masks use sequence indices.
        block_length: positions of a block, None = the network's.
        attention_mask: None = block-causal; [B, S] padding (1 = real), AND-ed with block-causal; [B, 1 or heads, S, S],
            taken as given: bool, or numbers 0 and 1 (1 = attend), or additive floats, none of them above 0. Where
            experts are chosen per block, only [B, S] says which positions are padding and have no say in that.
        output_hidden_states: return those of all layers.
        output_router_indices: return each token's experts.
        return_dict: False returns the values of ModelOutput as a tuple, logits first.
        ignored: what changes nothing (habits.FORWARD).
        Raises ValueError on shapes and masks that do not fit, and on ids outside the vocabulary if they are on the CPU.
        """
        habits.refuse("forward", ignored, habits.FORWARD)
        input_ids = habits.token_ids("input_ids", input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: int64 [B, S] expected, got {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.device.type == "cpu":  # elsewhere to look at them would be to wait for the device
            habits.check_vocabulary("input_ids: there are", input_ids, self.config.vocab_size)
        input_ids = input_ids.to(self.device)
        batch, size = input_ids.shape
        block_length = self.block_length if block_length is None else as_int("block_length", block_length, 1)
        if position_ids is None:
            position_ids = torch.arange(size, device=input_ids.device)[None]
        position_ids = habits.as_tensor("position_ids", position_ids).to(self.device)
        if attention_mask is not None:
            attention_mask = habits.as_tensor("attention_mask", attention_mask).to(self.device)
        if position_ids.shape not in ((batch, size), (1, size)):
            raise ValueError(f"position_ids: [{batch}, {size}] expected, got {list(position_ids.shape)}")
        mask = whole_mask(
            attention_mask, (batch, size), block_length, self.layers[0].attention.heads, self.dtype, self.device
        )
        angles = Angles(*self._angles(position_ids.expand(batch, size).flatten()))
        block = None
        if self.config.expert_capacity is not None:
            padded = attention_mask is not None and attention_mask.ndim == 2
            real = habits.as_bool(attention_mask).flatten() if padded else None
            block = token_blocks(batch, size, block_length, self.device, real)

        def attend(q, k, v):
            return masked_attention(*(t.unflatten(0, (batch, size)) for t in (q, k, v)), mask).flatten(0, 1)

        x, delta = self.word_embeddings(input_ids.flatten()), None
        hidden, chosen = [x], []
        for layer in self.layers:
            x, delta, ids = layer(x, delta, angles, attend, block)
            if output_hidden_states:
                hidden.append(x + summed(delta))
            chosen.append(ids)
        _, x = self.norm.add(x, delta, wide=output_hidden_states)
        hidden.append(unquantised(x))
        logits = self.lm_logits(x).float().unflatten(0, (batch, size))
        if attention_mask is None or attention_mask.ndim == 2:
            _whole(logits).block_length = block_length
        output = ModelOutput(
            logits,
            tuple(h.unflatten(0, (batch, size)) for h in hidden) if output_hidden_states else None,
            tuple(chosen) if output_router_indices else None,
        )
        return output if return_dict in (True, None) else output.to_tuple()

    @isolated
    @counters_at_zero
    def forward_blocks(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        spans: list[Span] | BlockBatch,
        cache: PagedKVCache,
        read: Read | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of packed spans of whole blocks over cached pages; their K/V are written to their pages.

        tokens: int64 [T], T = blocks of all spans times L.
        positions: int64 [T], for angles: those of the spans' blocks; of a MASKED block those of its CLEAN one.
        spans: the blocks, Spans or a BlockBatch, which a CUDA graph can hold.
        cache: holds their pages and those of the blocks before.
        read: with Spans only: whose hidden states are wanted, None = everybody's; of the others the last layer computes
            no more than their K/V.
        slots: int64 [T] of the cache, -1 = nowhere, where they are known; None = those of the spans' pages.
        Returns [T, H] after the final norm, or [M, H] of what is read, on a GPU in fp8 where the LM head is: lm_logits
        turns the needed ones into logits.
        """
        length = cache.block_length
        x, delta = self.word_embeddings(tokens), None
        blocks, slot = place_blocks(spans, length, x) if slots is None else (spans, slots)
        block = None
        if self.config.expert_capacity is not None:
            block = token_blocks(1, tokens.shape[0], length, x.device, _exist(positions, blocks, length))
        angles = look_up(*self._angle_table(_longest(spans, length)), positions)
        *layers, last = zip(self.layers, cache.k, cache.v, strict=True)
        for layer, k, v in layers if read is not None else [*layers, last]:
            x, delta, _ = layer(x, delta, angles, partial(_attend, k, v, blocks), block, (k, v, slot))
        if read is None:
            return self.norm.add(x, delta)[1]
        layer, k, v = last
        begins = torch.tensor(read.blocks, dtype=torch.int64, device=x.device)[:, None] * length
        offsets = torch.arange(length, dtype=torch.int64, device=x.device)
        own = (begins + offsets).flatten()  # tokens of the blocks that are read
        blocks, _ = place_blocks(single_blocks(spans, read.blocks), length, x)
        if block is None:
            within, after = read.rows, slice(None)
        else:  # experts are chosen for whole blocks
            within, after = slice(None), read.rows
            block = token_blocks(1, len(own), length, x.device, block.real[own])
        attend = partial(_attend, k, v, blocks, own=own, rows=within)
        x, delta, _ = layer(x, delta, angles, attend, block, (k, v, slot), own[within])
        return self.norm.add(x, delta)[1][after]

    def new_cache(self, num_pages: int, block_length: int) -> PagedKVCache:
        """An empty cache for the KV heads that the layers hold, in the network's dtype, where the network is.

        num_pages: blocks that it has room for.
        block_length: positions of a block.
        """
        kv_heads = self.layers[0].attention.kv_heads
        return PagedKVCache(self.config, num_pages, block_length, self.dtype, self.device, kv_heads)

    def generate(self, inputs, *args, **kwargs):
        """Text from this model; see llada2_fast.generate.generate for all arguments."""
        from .generate import generate  # the one upward import: the model card's own spelling is model.generate(...)

        return generate(self, inputs, *args, **kwargs)

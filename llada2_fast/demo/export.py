"""Writes what `train` learnt as a checkpoint folder in the released models' layout, with its model card."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llada2_fast.demo import network as t
from llada2_fast.demo import tasks
from llada2_fast.demo import tokenizer as tokenizers

MAX_POSITIONS = 4096


def state_dict(parameters: dict[str, Tensor], biases: Tensor) -> dict[str, Tensor]:
    """The masters under Hugging Face names: bf16, `expert_bias` fp32, `*_proj` as [out, in]."""

    def mlp(prefix: str, gate_up: Tensor, out: Tensor) -> dict[str, Tensor]:
        return {f"{prefix}.gate_proj": gate_up[0], f"{prefix}.up_proj": gate_up[1], f"{prefix}.down_proj": out.T}

    p = {name: w.detach() for name, w in parameters.items()}
    named = {"model.word_embeddings": p["embed"], "lm_head": p["head"], "model.norm": p["norm"]}
    for i in range(t.LAYERS):
        layer = f"model.layers.{i}"
        named |= {
            f"{layer}.input_layernorm": p[f"{i}.norm1"],
            f"{layer}.post_attention_layernorm": p[f"{i}.norm2"],
            f"{layer}.attention.query_key_value": p[f"{i}.qkv"],
            f"{layer}.attention.dense": p[f"{i}.dense"],
            f"{layer}.attention.query_layernorm": p[f"{i}.q_norm"],
            f"{layer}.attention.key_layernorm": p[f"{i}.k_norm"],
        }
        gate_up, out = p[f"{i}.in"], p[f"{i}.out"]
        if i == 0:
            named |= mlp(f"{layer}.mlp", gate_up, out)
            continue
        named[f"{layer}.mlp.gate"] = p[f"{i}.gate"]
        for expert in range(t.EXPERTS):
            named |= mlp(f"{layer}.mlp.experts.{expert}", gate_up[:, expert], out[expert])
        named |= mlp(f"{layer}.mlp.shared_experts", gate_up[:, t.EXPERTS], out[t.EXPERTS])
    tensors = {f"{name}.weight": w.bfloat16().contiguous() for name, w in named.items()}
    for i in range(1, t.LAYERS):
        tensors[f"model.layers.{i}.mlp.gate.expert_bias"] = biases[i].float().contiguous()
    return tensors


def config(vocab: int, variant: t.Variant) -> dict:
    """config.json of the model, with every field that the released checkpoints have."""
    edits = [vocab - len(tokenizers.EDIT_TOKENS) + i for i in range(2)]
    own = dict(zip(("delete_token_id", "split_token_id"), edits, strict=True)) if variant.edits else {}
    if variant.capacity is not None:
        own["expert_capacity"] = variant.capacity
    return own | {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "block_size": t.BLOCK,
        "dtype": "bfloat16",
        "embedding_dropout": 0.0,
        "eos_token_id": t.EOS_ID,
        "first_k_dense_replace": 1,
        "head_dim": t.HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": t.HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": t.DENSE,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 28,
        "model_type": "llada2_moe",
        "moe_intermediate_size": t.EXPERT,
        "moe_router_enable_expert_bias": True,
        "n_group": t.GROUPS,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": t.HEADS,
        "num_experts": t.EXPERTS,
        "num_experts_per_tok": t.TOP_K,
        "num_hidden_layers": t.LAYERS,
        "num_key_value_heads": t.KV_HEADS,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": t.EOS_ID,
        "partial_rotary_factor": t.ROTARY / t.HEAD_DIM,
        "rms_norm_eps": t.EPS,
        "rope_scaling": None,
        "rope_theta": t.THETA,
        "rotary_dim": t.ROTARY,
        "routed_scaling_factor": t.ROUTED_SCALE,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "topk_group": t.TOP_GROUPS,
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
        "vocab_size": vocab,
    }


def export(
    folder: str | Path, parameters: dict[str, Tensor], biases: Tensor, variant: t.Variant, card: str | None = None
) -> None:
    """Write weights, config.json, generation_config.json, the tokenizer and, with `card`, README.md to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.build(variant.edits)
    save_file(state_dict(parameters, biases), folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"eos_token_id": t.EOS_ID, "pad_token_id": t.EOS_ID, "mask_token_id": t.MASK_ID}
    for name, content in (("config", config(tokenizer.get_vocab_size(), variant)), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizers.save(tokenizer, folder, MAX_POSITIONS, variant.edits)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


_PARTS_2_2 = """
Beside that it has what LLaDA2.2 has: the tokens of a block of 16 share 4 of the 8 experts, and the ids `<|delete|>` and
`<|split|>`, predicted at a token that is too many and at one that another is missing before. Training left tokens out
and put some in; with an `editing_threshold` decoding acts on them.
"""


def model_card(results: dict[str, tuple[float, float, list]], run: str, variant: str, mixed: bool = False) -> str:
    """README.md of the checkpoint; `results` as `evaluate` returns them, `run` says how it was trained; variant: a name
    of VARIANTS; mixed: of `train`."""
    rows = "\n".join(f"| {task} | {accuracy:.3f} | {tpf:.2f} |" for task, (accuracy, tpf, _) in results.items())
    of_2_2 = variant == "2.2"
    title = "The embedded demonstration model, as a LLaDA2.2" if of_2_2 else "The embedded demonstration model"
    command = "python -m llada2_fast.demo.train" + " --variant 2.2" * of_2_2 + " --block-sizes mixed" * mixed
    single = "\nThe same forward trained block size 1." * mixed
    parts = _PARTS_2_2 if of_2_2 else ""
    return f"""---
license: apache-2.0
library_name: llada2-fast
tags: [block-diffusion, llada2, demonstration]
---

# {title}

A LLaDA2 mixture-of-experts network of 1.1 million parameters (4 layers, hidden size 128, 8 experts top-2 and a shared
one, block size 16), trained from random weights on generated sentences. It has every part of the released models and
their checkpoint layout, so it runs the real decoding code in milliseconds. It knows five toy tasks and nothing else:
its speed and accuracy say nothing about the released models.
{parts}
| task | prompt | answer |
|---|---|---|
| spell | `Spell 7305, 12.` (1-3 numbers of 1-4 digits) | one line per number, in words |
| add | `Add 847 and 96.` (two numbers of 1-4 digits) | column addition, units first, then the sum |
| reverse | `Reverse moon lamp bear owl.` (4-12 of 40 words) | the words backwards |
| json | `Convert {{"name": "Zoe", "age": 44}}` (2-4 of 6 fields) | `key=value` lines |
| story | `Tell a story about Tom the cat and Nora the owl near the lake with a red kite.` (or parts of it) | a story |
| anything else | `Write a poem.` | "{tasks.FALLBACK}" |

The words it knows are listed in `llada2_fast/demo/tasks.py`. Heroes and friends of stories come from separate lists.

## Measured

Exact match on 500 prompts per task that training never saw (md5 of the prompt divisible by 20), greedy, threshold 0.9,
no editing, fp32; tokens per forward count the answer and its first end token, prefill excluded.

| task | exact match | tokens per forward |
|---|---|---|
{rows}

The prompts are unseen, the numbers and words in them are not. `python -m benchmarks.quality{" --variant 2.2" * of_2_2}`
measures the same with the project's own decoder, over thresholds and editing.

## Made by

`{command}`: {run}.
Block-diffusion loss on two noisy copies per sequence, with token-to-token corruption so that editing works; Muon and
AdamW; bf16 weights. The data are generated while training (`tasks.py`); nothing was downloaded.{single}

## Limits

Prompts must follow the forms above to the letter, full stops and spaces included; near misses get the last row's
sentence or a wrong answer. Training saw prompts of up to about 300 tokens, seven per cent of them with one earlier
question and answer and three per cent with one of three system messages. Longer conversations are not measured, and
other system messages can spoil the answer.
"""

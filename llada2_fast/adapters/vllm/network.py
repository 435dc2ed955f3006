"""The LLaDA2 MoE network on vLLM's layers: its kernels, its sharding, its paged cache. Maths as in model.py."""

import functools

import torch
from torch import nn

from .state import model_state_class


class Attention(nn.Module):
    """QKV projection, QK-norm, RoPE on the leading dimensions, attention, output projection."""

    def __init__(self, config, cache_config, quant_config, prefix):
        from vllm.distributed import get_tensor_model_parallel_world_size
        from vllm.model_executor.layers.attention import Attention as PagedAttention
        from vllm.model_executor.layers.layernorm import RMSNorm
        from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
        from vllm.model_executor.layers.rotary_embedding import get_rope

        super().__init__()
        ranks, self.head_dim = get_tensor_model_parallel_world_size(), config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads = heads // ranks, max(1, kv_heads // ranks)
        self.query_key_value = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, kv_heads, bias=config.use_qkv_bias, quant_config=quant_config,
            prefix=f"{prefix}.query_key_value",
        )  # fmt: skip
        self.norms = config.use_qk_norm
        if self.norms:
            self.query_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=config.use_bias, quant_config=quant_config,
            prefix=f"{prefix}.dense",
        )  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_factor != 1.0:
            rope |= {"rope_type": "linear", "factor": config.rope_factor}
        self.rotary_emb = get_rope(
            self.head_dim, config.max_position_embeddings, is_neox_style=True,
            rope_parameters=rope | {"partial_rotary_factor": config.rotary_dim / self.head_dim},
        )  # fmt: skip
        self.attn = PagedAttention(
            self.heads, self.head_dim, self.head_dim**-0.5, num_kv_heads=self.kv_heads, cache_config=cache_config,
            quant_config=quant_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, hidden_states, positions):
        qkv, _ = self.query_key_value(hidden_states)
        q, k, v = qkv.split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        if self.norms:
            q = self.query_layernorm(q.unflatten(-1, (self.heads, self.head_dim))).flatten(-2)
            k = self.key_layernorm(k.unflatten(-1, (self.kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.dense(self.attn(q, k, v))
        return output


class MLP(nn.Module):
    """down( silu(gate(x)) * up(x) ), without biases."""

    def __init__(self, config, inner, quant_config, prefix, reduce_results=True):
        from vllm.model_executor.layers.activation import SiluAndMul
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [inner] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, config.hidden_size, bias=False, quant_config=quant_config, reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )  # fmt: skip
        self.act_fn = SiluAndMul()

    def forward(self, hidden_states):
        x, _ = self.gate_up_proj(hidden_states)
        x, _ = self.down_proj(self.act_fn(x))
        return x


class MoE(nn.Module):
    """Routed experts plus the shared expert, which is neither scaled nor gated. The router is float32 throughout."""

    def __init__(self, config, quant_config, prefix):
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear

        super().__init__()
        self.gate = GateLinear(
            config.hidden_size, config.num_experts, out_dtype=torch.float32, params_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )  # fmt: skip
        device = torch.get_default_device()  # where vLLM wants its weights
        self.gate.expert_bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32, device=device))
        inner = config.moe_intermediate_size
        shared = None
        if config.num_shared_experts:
            # the runner of the experts reduces the sum of both
            name = f"{prefix}.shared_experts"
            shared = MLP(config, config.num_shared_experts * inner, quant_config, name, reduce_results=False)
        self.shared_experts = shared
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts, top_k=config.num_experts_per_tok, hidden_size=config.hidden_size,
            intermediate_size=inner, shared_experts=shared, quant_config=quant_config, prefix=f"{prefix}.experts",
            use_grouped_topk=True, num_expert_group=config.n_group, topk_group=config.topk_group,
            scoring_func="sigmoid", e_score_correction_bias=self.gate.expert_bias,
            renormalize=config.num_experts_per_tok > 1, routed_scaling_factor=config.routed_scaling_factor,
            router_logits_dtype=torch.float32,
        )  # fmt: skip

    def forward(self, hidden_states):
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=router_logits)


class Layer(nn.Module):
    def __init__(self, config, index, vllm_config, prefix):
        from vllm.model_executor.layers.layernorm import RMSNorm

        super().__init__()
        quant_config = vllm_config.quant_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, vllm_config.cache_config, quant_config, f"{prefix}.attention")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if index < config.first_k_dense_replace:
            self.mlp = MLP(config, config.intermediate_size, quant_config, f"{prefix}.mlp")
        else:
            self.mlp = MoE(config, quant_config, f"{prefix}.mlp")

    def forward(self, hidden_states, positions, residual):
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.attention(hidden_states, positions)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Backbone(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, *, vllm_config, prefix=""):
        from vllm.model_executor.layers.layernorm import RMSNorm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        super().__init__()
        config = vllm_config.model_config.hf_config.to_model_config()
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.word_embeddings"
        )
        self.layers = nn.ModuleList(
            Layer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, positions, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


@functools.cache
def _compiled_backbone():
    """Backbone as vLLM compiles it; its decorator changes the class, so it is applied once."""
    from vllm.compilation.decorators import support_torch_compile

    return support_torch_compile(Backbone)


class LLaDA2MoeModelLM(nn.Module):
    """LLaDA2.0 and 2.1 for vLLM; its names are those of the checkpoint, but for stacked gate and up projections."""

    packed_modules_mapping = {"query_key_value": ["query_key_value"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config, prefix=""):
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.models.utils import maybe_prefix

        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = _compiled_backbone()(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )  # fmt: skip
        if self.config.to_model_config().tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.word_embeddings)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    @staticmethod
    def get_model_state_cls():
        return model_state_class()

    def embed_input_ids(self, input_ids):
        return self.model.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """input_ids, positions [T] -> hidden states [T, H] after the final norm. No pipeline parallelism."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights):
        """Names of the parameters that `weights`, pairs of name and tensor as in the checkpoint, have filled."""
        from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

        mapper = WeightsMapper(
            orig_to_new_prefix={"model.language_model.": "model."},
            orig_to_new_substr={".gate.e_score_correction_bias": ".gate.expert_bias"},
            # not those of the routed experts: their own loader stacks them
            orig_to_new_stacked={
                f"{parent}.{part}_proj": (f"{parent}.gate_up_proj", half)
                for parent in (".mlp", ".shared_experts")
                for half, part in enumerate(("gate", "up"))
            },
        )
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)

# SPDX-License-Identifier: Apache-2.0
"""A compact trainable MLA transformer with DeepSeek-V2's structure and Hugging Face parameter names.

Multi-head latent attention after DeepSeek-V2 (arXiv:2405.04434), every feed-forward layer dense. Training runs the
un-absorbed form: keys and values are expanded from the latent for each head. The state dict can be saved as it is and
loaded by transformers' and vLLM's DeepseekV2ForCausalLM. `sparse_model` adds DeepSeek-V3.2's indexer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model. Latent (512), rope (64), nope (64) and value (128) sizes are ones that MLA kernels serve."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rope_tables(length: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each float32 [length, qk_rope_head_dim / 2]."""
    exponents = torch.arange(0, config.qk_rope_head_dim, 2, device=device).float() / config.qk_rope_head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), config.rope_theta**-exponents)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of the last dimension of x [b, heads, length, 64]: the interleaved rope of DeepSeek."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of query and key [b, heads, length, d_k] over value [b, heads, length, d_v]."""
    width = value.shape[-1]
    if value.is_cuda and width < key.shape[-1]:
        # PyTorch's flash attention wants one size for all three; zeros cost less than the next best kernel.
        value = functional.pad(value, (0, key.shape[-1] - width))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)[..., :width]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c, heads = config, config.num_attention_heads
        self._make_query()
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def _make_query(self) -> None:
        c = self.config
        width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        self.q_proj = nn.Linear(c.hidden_size, width, bias=False)

    def heads(self, q: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [b, heads, length, d] of all heads from the projected query and the layer's input."""
        c, heads = self.config, self.config.num_attention_heads
        b, length, _ = x.shape
        q_nope, q_rope = (
            q.view(b, length, heads, -1).transpose(1, 2).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, length, heads, -1).transpose(1, 2)
        k_nope, value = expanded.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        # One rope key serves all heads; it is what the latent cache stores beside the latent.
        k_rope = apply_rope(k_rope.unsqueeze(1), cos, sin).expand(b, heads, length, c.qk_rope_head_dim)
        query = torch.cat([q_nope, apply_rope(q_rope, cos, sin)], dim=-1)
        return query, torch.cat([k_nope, k_rope], dim=-1), value

    def merge(self, out: Tensor) -> Tensor:
        """The layer's output from that of the heads, [b, heads, length, v_head_dim]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.merge(attend(*self.heads(self.q_proj(x), x, cos, sin)))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, attention: type[Attention]) -> None:
        super().__init__()
        self.self_attn = attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, attention: type[Attention]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    """DeepseekV2ForCausalLM's dense subset: `model.*` and `lm_head.weight`, no bias, embeddings not tied."""

    attention: type[Attention] = Attention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Token embeddings start large beside what the layers add to them.

        The later layer has to compare token identities. With the usual small embeddings (0.02) the first layer's output
        drowns them: copying was not learnt in 500 steps on a CPU. With these sizes it was in 290 (in 75 on a GPU).
        """
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue  # norm weights stay one
            if "embed_tokens" in name:
                std = 0.5
            elif "lm_head" in name:
                std = 0.02
            else:
                std = 0.7 * weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= 0.5 * (2 * self.config.num_hidden_layers) ** -0.5
            nn.init.normal_(weight, std=std)

    def forward(self, ids: Tensor, last: int | None = None) -> Tensor:
        """Logits [b, last or length, vocab_size] of the last positions of ids [b, length]."""
        cos, sin = rope_tables(ids.shape[1], self.config, ids.device)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        if last is not None:
            x = x[:, -last:]
        return self.lm_head(self.model.norm(x))


def attentions(model: DemoModel) -> list[Attention]:
    """The attention of each layer."""
    return [module for module in model.modules() if isinstance(module, Attention)]

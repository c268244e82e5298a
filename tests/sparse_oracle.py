# SPDX-License-Identifier: Apache-2.0
"""A DeepSeek-V3.2 decoder in plain PyTorch: absorbed MLA over the keys that its own lightning indexer picks.

Written from the papers (DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3.2-Exp, github.com/deepseek-ai/DeepSeek-V3.2-Exp) for
whole sequences at once: no cache, no pages, no batches, and none of the project's code. It reads the weights by their
Hugging Face names and computes in float64 unless told otherwise, with the indexer's query and key in e4m3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evals.models.sparse_probe import ProbeConfig

_E4M3_LARGEST = 448.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight + bias


def rope_angles(length: int, size: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angles ``[length, size / 2]`` of each position and pair."""
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    return torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponents).to(dtype)


def rotate_adjacent(x: Tensor, angles: Tensor) -> Tensor:
    """Rope of attention: pairs are neighbours. x ``[T, heads, size]``."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rope of the indexer: pairs are an element of the first half and one of the second. x ``[T, heads, size]``."""
    first, second, cos, sin = *x.chunk(2, -1), angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def through_e4m3(x: Tensor) -> Tensor:
    """x ``[..., 128]`` rounded to e4m3 times a power of two for each row."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest / _E4M3_LARGEST)))
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


class Oracle:
    """The model of a checkpoint. `index_topk` of None means dense attention."""

    def __init__(
        self,
        config: ProbeConfig,
        weights: dict[str, Tensor],
        index_topk: int | None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.config, self.index_topk = config, index_topk
        self.weights = {name: weight.to(dtype) for name, weight in weights.items()}

    def logprobs(self, ids: list[int]) -> Tensor:
        """``[len(ids), vocab_size]``: log-probabilities of what follows each token."""
        c = self.config
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(c.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn")
            normed = self._norm(x, f"{prefix}.post_attention_layernorm")
            gate = self._linear(normed, f"{prefix}.mlp.gate_proj")
            up = self._linear(normed, f"{prefix}.mlp.up_proj")
            x = x + self._linear(torch.nn.functional.silu(gate) * up, f"{prefix}.mlp.down_proj")
        return torch.log_softmax(self._linear(self._norm(x, "model.norm"), "lm_head"), -1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        c, heads = self.config, self.config.num_attention_heads
        angles = rope_angles(len(x), c.qk_rope_head_dim, c.rope_theta, x.dtype)
        compressed = self._norm(self._linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm")
        q = self._linear(compressed, f"{name}.q_b_proj").unflatten(-1, (heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self._linear(x, f"{name}.kv_a_proj_with_mqa").split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self._norm(latent, f"{name}.kv_a_layernorm")
        up = self.weights[f"{name}.kv_b_proj.weight"].unflatten(0, (heads, -1))  # [heads, nope + v, rank]
        w_k, w_v = up.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        query = torch.cat([torch.einsum("thd,hdr->thr", q_nope, w_k), rotate_adjacent(q_rope, angles)], -1)
        key = torch.cat([latent, rotate_adjacent(k_rope.unsqueeze(1), angles).squeeze(1)], -1)
        scores = torch.einsum("thr,sr->ths", query, key) * (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
        scores = scores.masked_fill(~self._attended(x, compressed, name).unsqueeze(1), -math.inf)
        out = torch.einsum("ths,sr->thr", torch.softmax(scores, -1), latent)
        return self._linear(torch.einsum("thr,hvr->thv", out, w_v).flatten(1), f"{name}.o_proj")

    def _attended(self, x: Tensor, compressed: Tensor, name: str) -> Tensor:
        """Which keys each token attends to, ``[T, T]``."""
        length = len(x)
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if self.index_topk is None or self.index_topk >= length:
            return visible
        logits = self.index_logits(x, compressed, name).masked_fill(~visible, -math.inf)
        best = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self.index_topk]
        return torch.zeros_like(visible).scatter_(1, best, True) & visible

    def index_logits(self, x: Tensor, compressed: Tensor, name: str) -> Tensor:
        """The indexer's score of each key for each token, ``[T, T]``."""
        c, rope = self.config, self.config.qk_rope_head_dim
        angles = rope_angles(len(x), rope, c.rope_theta, x.dtype)
        q = self._linear(compressed, f"{name}.indexer.wq_b").unflatten(-1, (c.index_n_heads, -1))
        k = layer_norm(
            self._linear(x, f"{name}.indexer.wk"),
            self.weights[f"{name}.indexer.k_norm.weight"],
            self.weights[f"{name}.indexer.k_norm.bias"],
        ).unsqueeze(1)
        q = through_e4m3(torch.cat([rotate_halves(q[..., :rope], angles), q[..., rope:]], -1))
        k = through_e4m3(torch.cat([rotate_halves(k[..., :rope], angles), k[..., rope:]], -1)).squeeze(1)
        weights = self._linear(x, f"{name}.indexer.weights_proj") * c.index_n_heads**-0.5 * c.index_head_dim**-0.5
        return torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q, k).relu(), weights)

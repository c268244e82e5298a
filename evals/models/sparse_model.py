# SPDX-License-Identifier: Apache-2.0
"""The trainable model with DeepSeek-V3.2's lightning indexer: parameter names of DeepseekV32ForCausalLM.

DeepSeek sparse attention (DeepSeek-V3.2, arXiv:2512.02556): for each token the indexer scores all keys before it with
a few light heads, and attention sees the best `index_topk` of them. Three ways to run the model: dense, dense with the
indexer's loss (its warm-up), and sparse with or without the loss.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evals.models.model import Attention, DecoderLayer, DemoModel, ModelConfig, RMSNorm, attend, rope_tables

E4M3_LARGEST = 448.0
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class SparseConfig(ModelConfig):
    """Shape of the model. 32 or 64 index heads of 128 are what DeepGEMM's kernels take, and a top-k that is a multiple
    of 128 is what vLLM's sparse backends for Hopper take (512, 1024 and 2048 have the fastest top-k kernels there)."""

    q_lora_rank: int = 128
    index_topk: int = 512
    index_n_heads: int = 32
    index_head_dim: int = 128


@dataclass(frozen=True)
class Mode:
    """How a pass runs.

    topk: keys that attention sees; None: all of them. quantise: pick them by scores in e4m3, as kernels that serve do.
    rows: [b, r] positions at which index scores are compared with attention weights, or None. recall: measure there
    which share of the dense attention's weights the picked keys have, not the indexer's loss.
    """

    topk: int | None = None
    quantise: bool = False
    rows: Tensor | None = None
    recall: bool = False


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The indexer's rope: element i of the first half is paired with element i of the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def through_e4m3(x: Tensor) -> Tensor:
    """x [..., 128] rounded to e4m3 times a power of two for each row."""
    scale = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1, keepdim=True).clamp_min(1e-4) / E4M3_LARGEST)))
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class Indexer(nn.Module):
    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        c = self.config = config
        self.wq_b = nn.Linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim, bias=False)
        self.wk = nn.Linear(c.hidden_size, c.index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(c.index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(c.hidden_size, c.index_n_heads, bias=False)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index keys [b, length, 128]; the rope part comes first."""
        rope = self.config.qk_rope_head_dim
        norm = self.k_norm  # in float32 whatever the weights are in, as vLLM has it
        key = functional.layer_norm(
            self.wk(x).float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        ).to(x.dtype)
        return torch.cat([rotate_halves(key[..., :rope], cos, sin), key[..., rope:]], dim=-1)

    def scores(
        self, x: Tensor, compressed: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, quantise: bool = False
    ) -> Tensor:
        """Scores [b, r, length], float32, of all keys for r query rows, future keys among them.

        x, compressed: the layer's input and its compressed query at those rows; cos, sin [b, r, rope / 2] likewise.
        """
        c = self.config
        b, r, _ = x.shape
        query = self.wq_b(compressed).view(b, r, c.index_n_heads, c.index_head_dim)
        rope, rest = query.split([c.qk_rope_head_dim, c.index_head_dim - c.qk_rope_head_dim], dim=-1)
        query = torch.cat([rotate_halves(rope, cos.unsqueeze(2), sin.unsqueeze(2)), rest], dim=-1)
        if quantise:
            query, keys = through_e4m3(query), through_e4m3(keys)
        products = (query.flatten(1, 2) @ keys.to(query.dtype).transpose(1, 2)).relu()
        weights = self.weights_proj(x).float() * (c.index_n_heads * c.index_head_dim) ** -0.5
        with torch.autocast(x.device.type, enabled=False):  # kernels add the heads in float32 too
            products = products.view(b * r, c.index_n_heads, -1).float()
            return torch.bmm(weights.view(b * r, 1, -1), products).view(b, r, -1)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """values [b, length, n] at positions rows [b, r]."""
    return values.gather(1, rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class SparseAttention(Attention):
    config: SparseConfig

    def _make_query(self) -> None:
        c = self.config
        width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, width, bias=False)
        self.indexer = Indexer(c)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> tuple[Tensor, Tensor | None]:
        """The layer's output, and with `mode.rows` the indexer's loss there, or its recall."""
        compressed = self.q_a_layernorm(self.q_a_proj(x))
        query, key, value = self.heads(self.q_b_proj(compressed), x, cos, sin)
        # The indexer learns from its own loss alone, the rest of the model from the other (section 2.1.1 of the paper).
        read = x.detach(), compressed.detach()
        chosen = None
        if mode.topk is not None and mode.topk < x.shape[1]:
            chosen = self._choose(*read, cos, sin, mode.topk, mode.quantise)
        measured = None
        if mode.rows is not None:
            length = x.shape[1]
            hidden = torch.arange(length, device=x.device) > mode.rows.unsqueeze(-1)  # [b, r, length]
            picked = ~hidden
            if chosen is not None:
                picked = chosen.gather(1, mode.rows.unsqueeze(-1).expand(-1, -1, length))
            if mode.recall:
                measured = (self._weights(query, key, mode.rows, hidden) * picked).sum(-1).mean()
            else:
                target = self._weights(query, key, mode.rows, ~picked)
                measured = self._divergence(target, *read, cos, sin, mode.rows, ~picked)
        if chosen is None:
            out = attend(query, key, value)
        else:
            out = functional.scaled_dot_product_attention(query, key, value, attn_mask=chosen.unsqueeze(1))
        return self.merge(out), measured

    @torch.no_grad()
    def _choose(self, x: Tensor, compressed: Tensor, cos: Tensor, sin: Tensor, topk: int, quantise: bool) -> Tensor:
        """bool [b, length, length]: whether a row's attention sees a key."""
        b, length, _ = x.shape
        keys = self.indexer.keys(x, cos, sin)
        chosen = torch.zeros(b, length, length, dtype=torch.bool, device=x.device)
        position = torch.arange(length, device=x.device)
        for start in range(0, length, _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, length))
            angles = cos[part].unsqueeze(0), sin[part].unsqueeze(0)
            scores = self.indexer.scores(x[:, part], compressed[:, part], keys, *angles, quantise)
            future = position > position[part].unsqueeze(1)
            best = scores.masked_fill_(future, -math.inf).topk(topk, dim=-1, sorted=False).indices
            chosen[:, part].scatter_(-1, best, True).masked_fill_(future, False)
        return chosen

    @torch.no_grad()
    def _weights(self, query: Tensor, key: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
        """[b, r, length]: attention weights of the query rows, the mean over heads."""
        at_rows = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        logits = (at_rows @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        return logits.masked_fill_(hidden.unsqueeze(1), -math.inf).softmax(-1).mean(1)

    def _divergence(
        self, target: Tensor, x: Tensor, compressed: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, hidden: Tensor
    ) -> Tensor:
        """Mean over rows of KL(target || softmax of index scores) over keys that are not hidden."""
        keys = self.indexer.keys(x, cos, sin)
        scores = self.indexer.scores(take(x, rows), take(compressed, rows), keys, cos[rows], sin[rows])
        guess = scores.masked_fill(hidden, -math.inf).log_softmax(-1).masked_fill(hidden, 0.0)
        return functional.kl_div(guess, target, reduction="sum") / rows.numel()


class SparseModel(DemoModel):
    """DeepseekV32ForCausalLM's dense-feed-forward subset."""

    config: SparseConfig
    attention = SparseAttention

    def __init__(self, config: SparseConfig) -> None:
        super().__init__(config)

    def run(self, ids: Tensor, mode: Mode, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits [b, last or length, vocab_size], and what `mode.rows` asks for, [layers] or empty."""
        cos, sin = rope_tables(ids.shape[1], self.config, ids.device)
        x = self.model.embed_tokens(ids)
        measures = []
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, SparseAttention)
            added, measured = layer.self_attn.run(layer.input_layernorm(x), cos, sin, mode)
            x = x + added
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            measures += [] if measured is None else [measured]
        x = x if last is None else x[:, -last:]
        return self.lm_head(self.model.norm(x)), torch.stack(measures) if measures else x.new_zeros(0)

    def forward(self, ids: Tensor, last: int | None = None) -> Tensor:
        """As it is served: sparse, the indexer in e4m3."""
        return self.run(ids, Mode(topk=self.config.index_topk, quantise=True), last)[0]

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [weight for name, weight in self.named_parameters() if ".indexer." in name]

    def renew_indexers(self, seed: int) -> None:
        """Draw the indexers anew, as a control that has learnt nothing."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if ".indexer." in name and weight.dim() == 2:
                    drawn = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
                    weight.copy_(drawn)
                elif ".indexer." in name:
                    weight.fill_(float(name.endswith("weight")))


def sparse_twin(dense: DemoModel, seed: int = 0, **index: Any) -> SparseModel:
    """The same function as `dense` in DeepSeek-V3.2's form, with new indexers.

    V3.2 compresses and normalises the query. With a rank of `hidden_size` and a compression that is the identity, the
    norm has nothing to do: its input is the layer's input norm without that norm's weights, whose root mean square is
    one already. Those weights go into the matrices that read the norm's output.

    index: fields of SparseConfig that ModelConfig lacks, but for q_lora_rank.
    """
    config = SparseConfig(**asdict(dense.config), q_lora_rank=dense.config.hidden_size, **index)
    sparse = SparseModel(config)
    sparse.renew_indexers(seed)
    weights = {name: weight.detach().clone() for name, weight in dense.state_dict().items()}
    for layer in range(config.num_hidden_layers):
        attention, norm = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.input_layernorm.weight"
        gain = weights[norm]
        weights[norm] = torch.ones_like(gain)
        weights[f"{attention}.q_a_proj.weight"] = torch.eye(config.hidden_size, dtype=gain.dtype)
        weights[f"{attention}.q_a_layernorm.weight"] = torch.ones_like(gain)
        weights[f"{attention}.q_b_proj.weight"] = weights.pop(f"{attention}.q_proj.weight") * gain
        weights[f"{attention}.kv_a_proj_with_mqa.weight"] *= gain
    missing, unexpected = sparse.load_state_dict(weights, strict=False)
    if unexpected or any(".indexer." not in name for name in missing):
        raise ValueError(f"not a dense twin: missing {missing}, unexpected {unexpected}")
    return sparse

# SPDX-License-Identifier: Apache-2.0
"""Save a model as a Hugging Face checkpoint folder, and load one back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evals.models.model import DemoModel, ModelConfig
from evals.models.sparse_model import SparseConfig, SparseModel
from evals.models.tokenizer import save_tokenizer
from evals.tasks.chain_recall import BOS_ID, EOS_ID, PAD_ID


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a DeepseekV2ForCausalLM or DeepseekV32ForCausalLM without mixture-of-experts layers."""
    sparse = isinstance(config, SparseConfig)
    return {
        "architectures": ["DeepseekV32ForCausalLM" if sparse else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v32" if sparse else "deepseek_v2",
        "q_lora_rank": None,
        **asdict(config),
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Every layer is dense, so no expert weight exists; transformers and vLLM still read these fields.
        "first_k_dense_replace": config.num_hidden_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc" if sparse else "greedy",
        "scoring_func": "sigmoid" if sparse else "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }


def save_checkpoint(model: DemoModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, model.safetensors (weights rounded to `dtype`), generation_config.json and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(dtype).contiguous().cpu() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config, dtype), indent=2) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(folder, model.config.vocab_size, model.config.max_position_embeddings)


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DemoModel:
    """Read a folder written by save_checkpoint; every weight must be present, none may be left over."""
    stored = json.loads((folder / "config.json").read_text())
    sparse = stored["model_type"] == "deepseek_v32"
    shape = SparseConfig if sparse else ModelConfig
    config = shape(**{field.name: stored[field.name] for field in fields(shape)})
    model = SparseModel(config) if isinstance(config, SparseConfig) else DemoModel(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device=device, dtype=dtype).eval()

# SPDX-License-Identifier: Apache-2.0
"""The models' tokenizers: one token a word, made offline from chain recall's words or from those of all tasks."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from evals.tasks import words
from evals.tasks.chain_recall import BOS_ID, SPECIAL_TOKENS, VOCAB

VOCABULARIES: dict[int, dict[str, int]] = {len(vocabulary): vocabulary for vocabulary in (VOCAB, words.VOCAB)}
"""By size, which tells a checkpoint's: chain recall's words are the first of all."""


def build_tokenizer(vocab_size: int = len(VOCAB)) -> Tokenizer:
    """Splits at white space, looks each word up, puts `<bos>` in front."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARIES[vocab_size], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    return tokenizer


def save_tokenizer(folder: Path, vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers and vLLM."""
    build_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

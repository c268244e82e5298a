# SPDX-License-Identifier: Apache-2.0
"""How far two runs' next-token distributions are apart over the same texts, decoded token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .paired import bootstrap_interval, compare

_REST = 1e-6  # rounding of a float32 sum of probabilities


@dataclasses.dataclass(frozen=True)
class Forced:
    """A teacher-forced run. T tokens of all texts one after the other, each decoded in a step of its own.

    Attributes:
        text, position, token: ``[T]``: which text, which token of it, and its id.
        logprob: ``[T]`` of the given token.
        top_tokens, top_logprobs: ``[T, K]``, the K most probable tokens, best first.
        whole: whether K is the vocabulary.
    """

    text: NDArray[Any]
    position: NDArray[Any]
    token: NDArray[Any]
    logprob: NDArray[Any]
    top_tokens: NDArray[Any]
    top_logprobs: NDArray[Any]
    whole: bool

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Forced:
        with np.load(path) as stored:
            return cls(**{name: stored[name] for name in stored.files if name != "whole"}, whole=bool(stored["whole"]))


def token_divergence(base: Forced, other: Forced) -> NDArray[np.float64]:
    """KL divergence of `other` from `base` at each token, ``[T]``, in nats.

    Over the tokens that are among the K most probable of both, and the rest as if it were one token: a lower bound of
    the divergence, because merging outcomes cannot increase it, and exact where K is the vocabulary.
    Raises ValueError where the runs decoded different texts.
    """
    for name in ("text", "position", "token"):
        if not np.array_equal(getattr(base, name), getattr(other, name)):
            raise ValueError("the two runs decoded different texts")
    rows = np.arange(len(base.token))[:, None].astype(np.int64)
    size = int(max(base.top_tokens.max(), other.top_tokens.max())) + 1
    wanted = (rows * size + base.top_tokens).ravel()
    keys = (rows * size + other.top_tokens).ravel()
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    common = (keys[order[place]] == wanted).reshape(base.top_tokens.shape)
    theirs = other.top_logprobs.ravel()[order[place]].reshape(common.shape).astype(np.float64)
    ours = base.top_logprobs.astype(np.float64)
    p = np.where(common, np.exp(ours), 0.0)
    q = np.where(common, np.exp(theirs), 0.0)
    divergence = (p * np.where(common, ours - theirs, 0.0)).sum(1)
    if not (base.whole and other.whole):
        rest_p, rest_q = (np.maximum(1 - part.sum(1), 0) + _REST for part in (p, q))
        divergence += rest_p * np.log(rest_p / rest_q)
    # The bound of a sum of roundings may fall below 0 by as much.
    return np.maximum(divergence, 0.0)


def compare_forced(base: Forced, other: Forced) -> dict[str, Any]:
    """Mean and largest divergence, top-1 agreement and perplexities of two runs over the same texts.

    The interval of the mean divergence and of the log-probability's difference is over texts, whose tokens are not
    independent of each other.
    """
    divergence = token_divergence(base, other)
    agree = base.top_tokens[:, 0] == other.top_tokens[:, 0]
    texts = np.unique(base.text)

    def by_text(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.array([values[base.text == text].mean() for text in texts])

    low, high = bootstrap_interval(by_text(divergence))
    loglik = compare(by_text(base.logprob).tolist(), by_text(other.logprob).tolist())
    return {
        "texts": len(texts),
        "tokens": len(base.token),
        "kl": float(divergence.mean()),
        "kl_low": low,
        "kl_high": high,
        "kl_p999": float(np.quantile(divergence, 0.999)),
        "kl_max": float(divergence.max()),
        "top1_agreement": float(agree.mean()),
        "perplexity_base": float(np.exp(-base.logprob.astype(np.float64).mean())),
        "perplexity_other": float(np.exp(-other.logprob.astype(np.float64).mean())),
        "loglik": dataclasses.asdict(loglik),
        "whole_vocabulary": base.whole and other.whole,
    }

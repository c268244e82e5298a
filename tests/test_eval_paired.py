# SPDX-License-Identifier: Apache-2.0
"""Paired statistics and divergences against what they are defined as, on cases that can be computed otherwise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
from vllm_fusedmla.evaluation import paired  # noqa: E402
from vllm_fusedmla.evaluation.divergence import Forced, compare_forced, token_divergence  # noqa: E402


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (6, 0), (5, 0), (10, 3), (3, 10), (7, 7)])
def test_mcnemar_is_the_binomial_tail(lost: int, gained: int) -> None:
    n, k = lost + gained, min(lost, gained)
    tail = 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert paired.mcnemar(lost, gained) == pytest.approx(min(1.0, tail))


def test_interval_is_the_normal_one_for_many_values(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.3, 2.0, size=4000)
    low, high = paired.bootstrap_interval(values)
    half = 1.96 * values.std() / 4000**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (low, high) == paired.bootstrap_interval(values)


def test_sign_test_agrees_with_all_signs(seed: int) -> None:
    change = np.random.default_rng(seed).normal(0.4, 1.0, size=10)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1).T
    exact = float((abs((signs * change).mean(1)) >= abs(change.mean()) - 1e-12).mean())
    assert paired.sign_test(change) == pytest.approx(exact, abs=0.01)
    assert paired.sign_test(np.zeros(5)) == 1.0 == paired.sign_test(np.array([0.0, 0.3, 0.0]))


@pytest.mark.parametrize(("n", "noise"), [(100, 0), (1000, 0), (300, 6)])
def test_detectable_loss_is_found_four_times_in_five(n: int, noise: int, seed: int) -> None:
    loss = paired.detectable_flips(n, noise)
    rng = np.random.default_rng(seed)
    flips = rng.multinomial(n, [noise / n + loss, noise / n, 1 - 2 * noise / n - loss], size=4000)
    found = [paired.mcnemar(int(lost), int(gained)) <= 0.05 for lost, gained, _ in flips]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_detectable_loss_shrinks_with_the_prompts_and_grows_with_noise() -> None:
    assert paired.detectable_flips(5, 0) == 1.0  # five flips one way are no evidence
    assert 0.07 < paired.detectable_flips(100, 0) < 0.09
    assert 0.007 < paired.detectable_flips(1000, 0) < 0.009
    assert paired.detectable_flips(1000, 20) > 2 * paired.detectable_flips(1000, 0)


def test_holm() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0] and paired.holm([]) == []


def flipped(n: int, lost: int, gained: int) -> tuple[list[float], list[float]]:
    """Scores of 0 and 1: `lost` fall, `gained` rise, half of the others are right in both."""
    base, other = [1.0] * lost + [0.0] * gained, [0.0] * lost + [1.0] * gained
    rest = [float(i % 2) for i in range(n - lost - gained)]
    return base + rest, other + rest


@pytest.mark.parametrize(
    ("n", "lost", "gained", "expected"),
    [
        (1000, 0, 0, "same"),
        (1000, 2, 2, "not enough data"),
        (5000, 4, 5, "same"),
        (100, 0, 0, "not enough data"),
        (1000, 30, 5, "worse"),
        (1000, 5, 30, "better"),
        (40, 5, 0, "not enough data"),
        (1000, 40, 38, "not enough data"),
    ],
)
def test_verdicts(n: int, lost: int, gained: int, expected: str) -> None:
    found = paired.compare(*flipped(n, lost, gained))
    assert (found.n, found.lost, found.gained, found.binary) == (n, lost, gained, True)
    assert found.difference == pytest.approx((gained - lost) / n)
    assert paired.verdict(found, found.p, 0.01) == expected


def test_without_right_answers_there_is_nothing_to_lose() -> None:
    found = paired.compare([0.0] * 5000, [0.0] * 5000)
    assert found.bounded and paired.verdict(found, found.p, 0.01) == "not enough data"


def test_a_verdict_needs_the_corrected_p() -> None:
    found = paired.compare(*flipped(1000, 12, 2))
    assert found.high < 0 and found.p < 0.05
    assert paired.verdict(found, found.p, 0.01) == "worse"
    assert paired.verdict(found, paired.holm([found.p] * 20)[0], 0.01) == "not enough data"


def test_values_that_are_not_0_and_1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.normal(-2.0, 1.0, size=400)
    noise = rng.normal(0, 1e-4, size=200)
    same = paired.compare(base.tolist(), (base + np.concatenate([noise, -noise])).tolist())
    assert not same.binary and paired.verdict(same, same.p, 0.01) == "same" and same.detectable < 1e-4
    worse = paired.compare(base.tolist(), (base - 0.05 + rng.normal(0, 0.05, size=400)).tolist())
    assert paired.verdict(worse, worse.p, 0.01) == "worse"
    shares = paired.compare([0.5] * 20, [0.5] * 20)
    assert shares.detectable == pytest.approx(1 - 0.05 ** (1 / 20))  # a share that 20 pairs need not show
    with pytest.raises(ValueError, match="equally long"):
        paired.compare([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="equally long"):
        paired.compare([], [])


def forced(logits: np.ndarray, top: int, texts: int = 2) -> Forced:
    """A run whose next-token distributions are the softmax of `logits` ``[T, V]``; it was given token t % V."""
    tokens, vocabulary = logits.shape
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    best = np.argsort(-logprobs, axis=1)[:, :top]
    given = np.arange(tokens) % vocabulary
    return Forced(
        text=np.repeat(np.arange(texts), tokens // texts),
        position=np.tile(np.arange(tokens // texts), texts),
        token=given,
        logprob=logprobs[np.arange(tokens), given].astype(np.float32),
        top_tokens=best,
        top_logprobs=np.take_along_axis(logprobs, best, 1).astype(np.float32),
        whole=top == vocabulary,
    )


def test_divergence(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, size=(60, 40))
    noisy = logits + rng.normal(0, 0.3, size=logits.shape)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, noisy))
    exact = (p * np.log(p / q)).sum(1)
    base, other = forced(logits, 40), forced(noisy, 40)
    assert token_divergence(base, other) == pytest.approx(exact, abs=1e-5)
    assert token_divergence(base, base) == pytest.approx(np.zeros(60), abs=1e-9)
    partial = token_divergence(forced(logits, 10), forced(noisy, 10))
    assert (partial <= exact + 1e-5).all() and partial.mean() > 0.3 * exact.mean()
    assert token_divergence(forced(logits, 10), forced(logits, 10)).max() == 0.0
    found = compare_forced(base, other)
    assert found["kl"] == pytest.approx(exact.mean(), abs=1e-5) and found["kl_max"] == pytest.approx(
        exact.max(), abs=1e-4
    )
    assert found["kl_low"] <= found["kl"] <= found["kl_high"] and found["whole_vocabulary"]
    assert found["top1_agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert found["perplexity_base"] == pytest.approx(np.exp(-np.log(p[np.arange(60), np.arange(60) % 40]).mean()))
    assert (found["texts"], found["tokens"], found["loglik"]["n"]) == (2, 60, 2)
    base.save(tmp_path / "run.npz")
    assert token_divergence(Forced.load(tmp_path / "run.npz"), other) == pytest.approx(exact, abs=1e-5)


def test_different_texts_are_not_compared(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(8, 5))
    with pytest.raises(ValueError, match="different texts"):
        token_divergence(forced(logits, 5), forced(logits, 5, texts=4))

# SPDX-License-Identifier: Apache-2.0
"""Training of the sparse model in miniature: the same function as the dense one, and an indexer that learns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:  # `evals` is not part of the installed package
    sys.path.insert(0, str(PROJECT))

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from conftest import RUN_SEED  # noqa: E402

from evals.models import outliers, train_sparse  # noqa: E402
from evals.models.batches import chain_batch  # noqa: E402
from evals.models.export import load_checkpoint, save_checkpoint  # noqa: E402
from evals.models.model import DemoModel, ModelConfig, attentions  # noqa: E402
from evals.models.sparse_model import Mode, SparseModel, sparse_twin  # noqa: E402
from evals.models.sparse_scores import compare, recall  # noqa: E402
from evals.tasks import chain_recall, words  # noqa: E402

CHECKPOINT = PROJECT / "evals" / "models" / "demo"
TOPK, STEPS = 24, 70


@pytest.fixture(scope="module")
def dense() -> DemoModel:
    """Random weights, the norms' too; scores large enough for attention to be peaked."""
    torch.manual_seed(RUN_SEED)
    config = ModelConfig(len(chain_recall.WORDS), hidden_size=32, intermediate_size=48, qk_nope_head_dim=128)
    model = DemoModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif "q_proj" in name or "lm_head" in name:
                weight.mul_(6)
    return model.eval()


@pytest.fixture(scope="module")
def sparse(dense: DemoModel) -> SparseModel:
    return sparse_twin(dense, RUN_SEED, index_topk=TOPK).eval()


@pytest.fixture(scope="module")
def ids() -> Any:
    return chain_batch(2, 10, 10, 60, torch.Generator().manual_seed(RUN_SEED))[0]


def test_twin_computes_what_the_dense_model_does(dense: DemoModel, sparse: SparseModel, ids: Any) -> None:
    with torch.no_grad():
        want, twin, few = dense(ids), sparse.run(ids, Mode())[0], sparse.run(ids, Mode(topk=TOPK))[0]
        every = sparse.run(ids, Mode(topk=ids.shape[1]))[0]
    assert want.std() > 0.1
    torch.testing.assert_close(twin, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(every, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few[:, :TOPK], want[:, :TOPK], rtol=1e-4, atol=1e-4)  # no more keys than are picked
    assert (few[:, TOPK:] - want[:, TOPK:]).abs().mean() > 0.01


def test_checkpoint_round_trip_keeps_every_weight(sparse: SparseModel, tmp_path: Path) -> None:
    save_checkpoint(sparse, tmp_path, torch.float32)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == sparse.config
    for name, weight in sparse.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_transformers_computes_the_same_logits(sparse: SparseModel, ids: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_checkpoint(sparse, tmp_path, torch.float32)
    # By name: in a process that has read a configuration for vLLM, transformers' auto classes take V3.2 for V3.
    theirs, info = transformers.DeepseekV32ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["DeepseekV32ForCausalLM"]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        ours, reference = sparse.run(ids, Mode(topk=TOPK))[0], theirs.eval()(ids).logits
    # Where two keys score almost alike for the last place, the two may pick different ones.
    same = ((ours - reference).abs().amax(-1) < 1e-3).float().mean()
    assert same > 0.97, same


def test_project_oracle_computes_the_same_answers(sparse: SparseModel, ids: Any) -> None:
    """tests/sparse_oracle.py, which tests compare vLLM with, reads a trained checkpoint like a random one."""
    from sparse_oracle import Oracle

    oracle = Oracle(sparse.config, sparse.state_dict(), TOPK)
    with torch.no_grad():
        ours = sparse(ids).log_softmax(-1)
    want = torch.stack([oracle.logprobs(row.tolist()) for row in ids]).float()
    same = ((ours - want).abs().amax(-1) < 1e-3).float().mean()
    assert same > 0.95, same  # ties for the last place, as above


def test_loss_reaches_the_indexer_alone_and_recall_is_a_share(sparse: SparseModel, ids: Any) -> None:
    rows = torch.randint(ids.shape[1], (2, 16))
    for topk in (None, TOPK):
        logits, losses = sparse.run(ids, Mode(topk=topk, rows=rows))
        assert losses.shape == (2,) and bool((losses > 0).all())
        sparse.zero_grad()
        losses.sum().backward()
        learning = {name for name, weight in sparse.named_parameters() if weight.grad is not None}
        assert learning == {name for name, _ in sparse.named_parameters() if ".indexer." in name}
        sparse.zero_grad()
        logits.sum().backward()
        assert all(weight.grad is None or not weight.grad.any() for weight in sparse.indexer_parameters())
    sparse.zero_grad()
    with torch.no_grad():
        few = sparse.run(ids, Mode(topk=TOPK, rows=rows, recall=True))[1]
        every = sparse.run(ids, Mode(rows=rows, recall=True))[1]
    assert bool((0 < few).all()) and bool((few < 1).all())
    torch.testing.assert_close(every, torch.ones(2))


def run_training(monkeypatch: pytest.MonkeyPatch, out: Path, **options: Any) -> list[dict[str, Any]]:
    """`python -m evals.models.train_sparse` on the committed model, and its log."""
    given = {"dense": CHECKPOINT, "out": out, "device": "cpu", "workers": 0, "tokens": 384, "rows": 96, "log-every": 4}
    given |= {"max-links": 16, "max-total": 128, "index-topk": 16, "index-heads": 8, "lr": 2e-2}
    given |= {"final-lengths": 300, "final-examples": 0} | options
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_sparse", *arguments])
    args = train_sparse.parse_arguments()
    # The clock counts steps here, so that a slow machine learns as much.
    done = [0]
    real_step = train_sparse.Trainer.train_step

    def train_step(trainer: train_sparse.Trainer) -> None:
        real_step(trainer)
        done[0] += 1

    monkeypatch.setattr(train_sparse.Trainer, "train_step", train_step)
    monkeypatch.setattr(train_sparse.Run, "fraction", property(lambda run: min(1.0, done[0] / STEPS)))
    run = train_sparse.Run(args.out, args.minutes, args.state)
    train_sparse.train(args, run)
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


def test_both_stages_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the committed dense model: the indexers' loss falls, and their recall rises far above a random one's."""
    seed = RUN_SEED % 1000
    log = run_training(monkeypatch, tmp_path / "out", seed=seed)
    stages = [record["stage"] for record in log if "divergence" in record]
    assert set(stages) == {"warmup", "sparse"} and stages == sorted(stages, reverse=True)
    new = sparse_twin(load_checkpoint(CHECKPOINT), seed, index_topk=16, index_n_heads=8)
    trained = load_checkpoint(tmp_path / "out")
    assert isinstance(trained, SparseModel) and trained.config == new.config
    ids = chain_batch(8, 16, 16, 60, torch.Generator().manual_seed(RUN_SEED))[0]
    rows = torch.arange(ids.shape[1] - 17, ids.shape[1] - 1).expand(8, -1)
    with torch.no_grad():
        losses = [model.run(ids, Mode(rows=rows))[1].tolist() for model in (new, trained)]
    recalls = [recall(model, ids, 16, 16) for model in (new, trained)]
    # The second layer's attention looks for one token in the whole context, which is what has to be learnt.
    assert losses[1][1] < 0.65 * losses[0][1], losses
    assert recalls[1][1] > recalls[0][1] + 0.2, recalls


def test_random_indexers_are_drawn_and_taken_back(sparse: SparseModel) -> None:
    before = {name: weight.clone() for name, weight in sparse.state_dict().items()}
    (record,) = compare(sparse, ["chain_recall"], (300,), 2, RUN_SEED)
    assert {"dense_exact", "trained_exact", "random_exact", "trained_recall", "random_recall"} <= set(record)
    for name, weight in sparse.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("which", ["dense", "sparse"])
def test_outliers_change_the_cache_and_not_the_model(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    save_checkpoint(request.getfixturevalue(which), tmp_path)
    model, stressed = load_checkpoint(tmp_path), load_checkpoint(tmp_path)
    outliers.stress(stressed, RUN_SEED, large=4, up=6, down=11)
    save_checkpoint(stressed, tmp_path / "stressed")
    stored = load_checkpoint(tmp_path / "stressed", torch.bfloat16)
    ids = chain_batch(2, 8, 8, 30, torch.Generator().manual_seed(RUN_SEED))[0]
    with torch.no_grad():
        torch.testing.assert_close(stressed(ids), model(ids), rtol=1e-5, atol=1e-5)
        # Powers of two: the bfloat16 checkpoint computes the very same numbers.
        assert torch.equal(stored(ids), load_checkpoint(tmp_path, torch.bfloat16)(ids))
    gains = attentions(stressed)[0].kv_a_layernorm.weight.abs().view(4, 128)
    assert bool((gains.amax(1) > 500 * gains.median(1).values).all())
    moved = [outliers.divergence(m, "fp8", ids, 8) for m in (model, stressed)]
    assert moved[1] > 3 * moved[0] > 0, moved


def test_all_tasks_vocabulary_begins_with_chain_recalls() -> None:
    assert words.WORDS[: len(chain_recall.WORDS)] == chain_recall.WORDS

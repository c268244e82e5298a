# SPDX-License-Identifier: Apache-2.0
"""Training on all tasks in miniature, and every checkpoint that lies in evals/models."""

from __future__ import annotations

import functools
import json
import random
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

from evals.models import mixture, run_state, train_tasks, unsaturate, widen  # noqa: E402
from evals.models.export import load_checkpoint  # noqa: E402
from evals.models.mixture import GENERATORS, LONGEST_TEXT, Mixture, any_sizes, batches, draw_batch  # noqa: E402
from evals.models.model import DemoModel, ModelConfig  # noqa: E402
from evals.models.sparse_model import SparseModel  # noqa: E402
from evals.models.sparse_scores import compare  # noqa: E402
from evals.models.task_scores import TASKS, encode_rows, score_task, tasks_of  # noqa: E402
from evals.models.tokenizer import VOCABULARIES, build_tokenizer  # noqa: E402
from evals.tasks import chain_recall, words  # noqa: E402

CHECKPOINTS = sorted(path.parent for path in (PROJECT / "evals" / "models").glob("*/model.safetensors"))
COMMITTED_BESIDE_DEMO = ("demo-dsa",)


def test_batches_are_examples_of_the_tasks() -> None:
    rng = random.Random(RUN_SEED)
    seen: list[str] = []
    while len(seen) < 60 or len(seen) < 1000 and set(seen) != set(GENERATORS):  # the rarest are one of 13 batches
        ids, answer_tokens, task = draw_batch(rng, 2048, 1024, 2)
        seen.append(task)
        rows, length = ids.shape
        assert rows >= 2 and 0 < answer_tokens < length <= max(1024, LONGEST_TEXT)
        assert bool((ids[:, 0] == chain_recall.BOS_ID).all()) and not bool((ids == chain_recall.UNK_ID).any())
        assert len({tuple(row) for row in ids.tolist()}) > 1
    assert set(seen) == set(GENERATORS)
    for task in GENERATORS:
        for _ in range(50):  # all sizes that training draws are ones that the generator takes
            GENERATORS[task](rng, **any_sizes(task, rng), total=1024)


def test_workers_make_the_batches_of_the_seed() -> None:
    here, there = (batches(Mixture(5, 512, 256), workers) for workers in (0, 1))
    for _ in range(3):
        (a, *rest), (b, *other) = next(here), next(there)
        assert torch.equal(a, b) and rest == other


def test_scores_count_right_answers() -> None:
    """A model that knows the answers has exact match 1 and perplexity 1, one that spoils one token has neither."""
    ids, answer_tokens = encode_rows("needles", 200, 6, RUN_SEED)
    spoilt: set[int] = set()

    def forward(batch: Any, last: int) -> Any:
        rows = [next(i for i, row in enumerate(ids) if torch.equal(row[:-1], got)) for got in batch]
        answers = ids[rows][:, -last:].clone()
        for place, row in enumerate(rows):
            if row in spoilt:
                answers[place, -1] = 0
        return 30.0 * torch.nn.functional.one_hot(answers, len(words.WORDS))

    cpu = torch.device("cpu")
    score = score_task(forward, cpu, "needles", 200, 6, RUN_SEED)
    assert (score.exact_match, score.token_accuracy) == (1.0, 1.0) and score.perplexity < 1.001
    spoilt |= {1, 4}
    score = score_task(forward, cpu, "needles", 200, 6, RUN_SEED, tokens_per_pass=400)
    assert score.exact_match == pytest.approx(4 / 6)
    assert score.token_accuracy == pytest.approx(1 - 2 / (6 * answer_tokens)) and score.perplexity > 2


def tiny_arguments(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> Any:
    given = f"--out {out} --device cpu --workers 0 --layers 1 --heads 2 --hidden 32 --nope 64 --tokens 512"
    given += f" --max-total 128 --max-links 8 --final-examples 0 --log-every 5 --lr 4e-2 --seed {RUN_SEED % 1000}"
    monkeypatch.setattr(sys, "argv", ["train_tasks", *given.split(), *more])
    return train_tasks.parse_arguments()


def count_steps(monkeypatch: pytest.MonkeyPatch, steps: int, cut_off_at: int | None = None) -> list[int]:
    """Let the clock count steps, so that a slow machine learns as much."""
    done = [0]
    real_step = train_tasks.Trainer.train_step

    def train_step(trainer: Any) -> None:
        if trainer.step == cut_off_at:
            raise KeyboardInterrupt
        real_step(trainer)
        done[0] += 1

    monkeypatch.setattr(train_tasks.Trainer, "train_step", train_step)
    monkeypatch.setattr(run_state.Run, "fraction", property(lambda run: min(1.0, done[0] / steps)))
    return done


def test_training_learns_and_writes_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = tiny_arguments(monkeypatch, tmp_path, "--others", "1")
    count_steps(monkeypatch, 60)
    # From the first step on the mixture alone, and of it what a model learns in seconds.
    monkeypatch.setattr(train_tasks, "Curriculum", functools.partial(train_tasks.Curriculum, stage="filler"))
    monkeypatch.setattr(mixture, "SHARES", {"generated_text": 1})
    run = run_state.Run(args.out, args.minutes, args.state)
    before = train_tasks.Trainer(args, run).model
    train_tasks.train(args, run)
    after = load_checkpoint(tmp_path)
    cpu = torch.device("cpu")
    perplexity = [score_task(m, cpu, "generated_text", 100, 8, 3).perplexity for m in (before, after)]
    assert perplexity[1] < perplexity[0] / 3, perplexity
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "trained" and log[-1]["step"] == 60
    assert after.config.vocab_size == len(words.WORDS)


def test_a_run_that_was_cut_off_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = tiny_arguments(monkeypatch, tmp_path / "out", "--state", str(tmp_path / "state.pt"))
    monkeypatch.setattr(run_state, "SAVE_EVERY_SECONDS", 0.0)
    done = count_steps(monkeypatch, 8, cut_off_at=5)
    with pytest.raises(KeyboardInterrupt):
        train_tasks.train(args, run_state.Run(args.out, args.minutes, args.state))
    assert (tmp_path / "state.pt").exists() and not (args.out / "model.safetensors").exists()
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    run = run_state.Run(args.out, args.minutes, args.state)
    trainer = train_tasks.Trainer(args, run)
    assert trainer.step == done[0] == 5 and trainer.resumes == 1
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, saved["model"][name])
    monkeypatch.undo()
    monkeypatch.setattr(run_state.Run, "fraction", property(lambda run: 1.0))
    train_tasks.train(args, run_state.Run(args.out, args.minutes, args.state))
    assert (args.out / "model.safetensors").exists() and not (tmp_path / "state.pt").exists()
    events = [json.loads(line).get("event") for line in (args.out / "training_log.jsonl").read_text().splitlines()]
    assert events.count("resumed") == 2 and events[-1] == "trained"


def test_state_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = tiny_arguments(monkeypatch, tmp_path, "--state", str(tmp_path / "state.pt"))
    monkeypatch.setattr(run_state, "SAVE_EVERY_SECONDS", 0.0)
    run = run_state.Run(args.out, args.minutes, args.state)
    run.maybe_save(train_tasks.Trainer(args, run).state)
    args.layers = 2
    with pytest.raises(ValueError, match="is of a run with another model"):
        train_tasks.Trainer(args, run_state.Run(args.out, args.minutes, args.state))


def test_weights_between_two_checkpoints_meet_the_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = tiny_arguments(monkeypatch, tmp_path)
    trainer = train_tasks.Trainer(args, run_state.Run(args.out, args.minutes, None))
    low = {name: torch.zeros_like(weight) for name, weight in trainer.model.state_dict().items()}
    trainer.model.load_state_dict({name: torch.ones_like(weight) for name, weight in low.items()})

    def share(examples: int) -> float:
        return float(trainer.model.lm_head.weight.detach().mean()) ** 3

    monkeypatch.setattr(trainer, "right_answers", share)
    train_tasks.between(trainer, low, (0.74, 0.86))
    assert 0.74 <= share(0) <= 0.86
    assert len({float(weight.detach().mean()) for weight in trainer.model.parameters()}) == 1


def small_model() -> Any:
    torch.manual_seed(RUN_SEED)
    return DemoModel(ModelConfig(len(chain_recall.WORDS), hidden_size=32, intermediate_size=48)).bfloat16()


def test_noise_is_repeatable_and_proportional() -> None:
    model = small_model()
    clean = {name: weight.clone() for name, weight in model.state_dict().items()}
    noise, again, other = (unsaturate.directions(model, seed) for seed in (3, 3, 4))
    for name, weight in clean.items():
        assert (name in noise) == (weight.dim() == 2)  # norms stay
        if name in noise:
            assert torch.equal(noise[name], again[name]) and not torch.equal(noise[name], other[name])
            assert float(noise[name].std() / weight.float().std()) == pytest.approx(1, abs=0.1)
    unsaturate.perturb(model, clean, noise, 0.0)
    assert all(torch.equal(weight, clean[name]) for name, weight in model.state_dict().items())
    unsaturate.perturb(model, clean, noise, 0.2)
    moved = model.lm_head.weight.detach().float() - clean["lm_head.weight"].float()
    torch.testing.assert_close(moved, 0.2 * noise["lm_head.weight"], atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("answers", [True, False])
def test_noise_is_searched_until_the_window_is_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: bool
) -> None:
    """With accuracy that falls with the noise the window is met; with one that never lies in it, the search ends."""
    model = small_model()
    clean = {name: weight.clone() for name, weight in model.state_dict().items()}
    noise = unsaturate.directions(model, RUN_SEED)
    given = ["unsaturate", "--model", "x", "--out", str(tmp_path), "--window", "0.7", "0.8"]
    monkeypatch.setattr(sys, "argv", given)
    args = unsaturate.parse_arguments()

    def check(model: Any, args: Any, run: Any, examples: int, seed: int, event: str, amount: float) -> float:
        moved = model.lm_head.weight.detach().float() - clean["lm_head.weight"].float()
        measured = float((moved * noise["lm_head.weight"]).sum() / noise["lm_head.weight"].square().sum())
        assert measured == pytest.approx(amount, rel=0.1, abs=1e-3)  # the model that is scored has this noise
        return 1 - amount if answers else float(amount < 0.1)

    monkeypatch.setattr(unsaturate, "check", check)
    run = run_state.Run(args.out, 1.0, None)
    if answers:
        assert 0.2 <= unsaturate.search(model, clean, noise, args, run) <= 0.3
    else:
        with pytest.raises(ValueError, match="window is too narrow"):
            unsaturate.search(model, clean, noise, args, run)


def test_demo_loses_its_answers_with_much_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command, from the committed model: little noise keeps the answers, much does not, and both are logged."""
    shares = []
    for noise in ("0.01", "0.6"):
        given = f"--model {PROJECT / 'evals/models/demo'} --out {tmp_path / noise} --noise {noise} --device cpu"
        given += " --total 259 --final-examples 8 --dtype float32"
        monkeypatch.setattr(sys, "argv", ["unsaturate", *given.split()])
        unsaturate.main()
        log = [json.loads(line) for line in (tmp_path / noise / "training_log.jsonl").read_text().splitlines()]
        assert [record["event"] for record in log] == ["made", "final"]
        shares.append(log[-1]["exact_match"])
    assert shares[0] > 0.7 and shares[1] < 0.3, shares


@pytest.mark.parametrize("name", ["demo", "demo-dsa"])
def test_a_wide_model_computes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """The command, then a text: four copies of each head, the same logits up to the order of a sum."""
    folder = PROJECT / "evals/models" / name
    monkeypatch.setattr(sys, "argv", ["widen", "--model", str(folder), "--out", str(tmp_path), "--copies", "4"])
    widen.main()
    model, wide = load_checkpoint(folder), load_checkpoint(tmp_path)
    assert type(wide) is type(model) and wide.config.num_attention_heads == 4 * model.config.num_attention_heads
    ids, answer_tokens = encode_rows("chain_recall", 600, 1, RUN_SEED)
    with torch.no_grad():
        expected, got = model(ids, last=answer_tokens), wide(ids, last=answer_tokens)
    assert float((got - expected).abs().max()) < 1e-3 < float(expected.abs().max())
    with pytest.raises(ValueError, match="copies must be a power of two, got 3"):
        widen.widen(model, 3)
    with pytest.raises(ValueError, match="not a multiple of 256 heads"):
        widen.widen(model, 64)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_checkpoint_is_shaped_for_kernels_and_tokenizer(folder: Path) -> None:
    model, stored = load_checkpoint(folder), json.loads((folder / "config.json").read_text())
    assert (stored["kv_lora_rank"], stored["qk_rope_head_dim"], stored["v_head_dim"]) == (512, 64, 128)
    assert stored["qk_nope_head_dim"] in (64, 128) and stored["vocab_size"] in VOCABULARIES
    built = json.loads(build_tokenizer(stored["vocab_size"]).to_str())
    assert json.loads((folder / "tokenizer.json").read_text())["model"] == built["model"]
    assert set(tasks_of(model.config.vocab_size)) <= set(TASKS)
    if isinstance(model, SparseModel):
        # What vLLM's sparse backends and DeepGEMM's kernels take.
        assert stored["index_topk"] % 128 == 0 and stored["index_n_heads"] in (32, 64)
        assert stored["index_head_dim"] == 128
        (record,) = compare(model, ["chain_recall"], (2048,), 2, RUN_SEED)
        assert record["dense_tokens"] > 0.9 and record["trained_tokens"] > record["dense_tokens"] - 0.05, record
        assert record["random_tokens"] < 0.5, record


def test_committed_checkpoints_are_small() -> None:
    folders = [folder for folder in CHECKPOINTS if folder.name in COMMITTED_BESIDE_DEMO]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) <= 8_000_000

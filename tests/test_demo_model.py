# SPDX-License-Identifier: Apache-2.0
"""Chain recall, the demo model's tokenizer and export, and the committed checkpoint's exact match."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:  # `evals` is not part of the installed package
    sys.path.insert(0, str(PROJECT))

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from evals.models.batches import chain_batch, copy_batch  # noqa: E402
from evals.models.evaluate import score_case  # noqa: E402
from evals.models.export import load_checkpoint, save_checkpoint  # noqa: E402
from evals.models.model import DemoModel, ModelConfig  # noqa: E402
from evals.models.tokenizer import build_tokenizer  # noqa: E402
from evals.tasks import chain_recall  # noqa: E402
from evals.tasks.chain_recall import Example, correct_hops, decode, encode, filler_for_length, make_example  # noqa: E402

CHECKPOINT = PROJECT / "evals" / "models" / "demo"


def walk_by_links(prompt: str, hops: int) -> tuple[list[str], int, int]:
    """Follow the prompt's links by a dictionary. Returns the walk, the number of links, the number of filler words."""
    body, question = prompt.split(" ? ")
    words = body.split()
    filler = [word for word in words if word.startswith("w")]
    rest = [word for word in words if not word.startswith("w")]
    assert rest[2::3] == [";"] * (len(rest) // 3)
    follow = dict(zip(rest[0::3], rest[1::3], strict=True))
    assert len(follow) == len(rest) // 3 == len(set(follow.values()))
    walk, node = [], question
    for _ in range(hops):
        node = follow[node]
        walk.append(node)
    return walk, len(follow), len(filler)


@pytest.mark.parametrize(("links", "hops", "filler"), [(2, 1, 0), (6, 6, 0), (64, 64, 0), (64, 16, 500), (256, 300, 9)])
def test_answer_is_the_walk_along_the_links(links: int, hops: int, filler: int) -> None:
    example = make_example(random.Random(links * 1000 + hops), links, hops, filler)
    walk, found_links, found_filler = walk_by_links(example.prompt, hops)
    assert example.answer.split() == walk
    assert (found_links, found_filler) == (links, filler)
    # One cycle: the walk visits every node before it comes back.
    assert len(set(walk)) == min(links, hops)


def test_examples_depend_on_the_seed_alone() -> None:
    assert make_example(random.Random(5), 16, 16, 40) == make_example(random.Random(5), 16, 16, 40)
    assert make_example(random.Random(5), 16, 16, 40) != make_example(random.Random(6), 16, 16, 40)


@pytest.mark.parametrize("total", [259, 1024, 8192])
def test_total_length_is_as_asked(total: int) -> None:
    example = make_example(random.Random(0), 64, 64, filler_for_length(64, 64, total))
    assert len(example.prompt_ids) + len(example.answer_ids) == total


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_example(random.Random(0), 1, 1), "links must be 2 to 256, got 1"),
        (lambda: make_example(random.Random(0), 257, 1), "links must be 2 to 256, got 257"),
        (lambda: make_example(random.Random(0), 4, 0), "hops must be at least 1, got 0"),
        (lambda: make_example(random.Random(0), 4, 1, -1), "filler_tokens must not be negative, got -1"),
        (lambda: filler_for_length(64, 64, 258), "total must be at least 259 for 64 links and 64 hops, got 258"),
    ],
)
def test_bad_sizes_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_correct_hops_counts_the_right_prefix() -> None:
    example = Example(prompt="? n001", answer="n002 n003 n004")
    assert correct_hops(example, " n002 n003 n004") == 3
    assert correct_hops(example, "n002 n009 n004") == 1
    assert correct_hops(example, "") == 0


def test_tokenizer_gives_the_ids_of_encode() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab_size() == len(chain_recall.WORDS) == len(set(chain_recall.WORDS))
    for seed in range(5):
        example = make_example(random.Random(seed), 20, 20, 100)
        assert tokenizer.encode(example.prompt).ids == example.prompt_ids == encode(example.prompt)
        assert tokenizer.decode(example.answer_ids) == example.answer == decode(example.answer_ids)
    assert tokenizer.encode("n001 nonsense ;").ids == encode("n001 nonsense ;")
    every_word = " ".join(chain_recall.WORDS[len(chain_recall.SPECIAL_TOKENS) :])
    assert tokenizer.encode(every_word).ids == encode(every_word)


def test_training_batches_have_the_form_of_the_examples() -> None:
    generator = torch.Generator().manual_seed(3)
    ids, hops = chain_batch(8, 12, 10, 30, generator)
    assert ids.shape == (8, 1 + 36 + 30 + 2 + 10)
    for row in ids.tolist():
        assert row[0] == chain_recall.BOS_ID
        prompt, answer = decode(row[:-hops]), decode(row[-hops:])
        walk, links, filler = walk_by_links(prompt, hops)
        assert (answer.split(), links, filler) == (walk, 12, 30)
        assert encode(prompt) == row[:-hops]
    assert len({tuple(row) for row in ids.tolist()}) == 8
    copies, known = copy_batch(4, 9, generator)
    assert copies.shape == (4, 1 + 9 + 1 + 5) and known == 4
    for row in copies.tolist():
        place = row.index(row[11])
        assert row[11:] == row[place : place + 5] and place + 5 <= 10


@pytest.fixture(scope="module")
def tiny_model() -> DemoModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(chain_recall.WORDS), hidden_size=32, intermediate_size=48, num_attention_heads=4
    )
    model = DemoModel(config)
    with torch.no_grad():  # norm weights other than one, so that a swapped norm would show
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def test_checkpoint_round_trip_keeps_every_weight(tiny_model: DemoModel, tmp_path: Path) -> None:
    save_checkpoint(tiny_model, tmp_path, torch.float32)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == tiny_model.config
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_transformers_computes_the_same_logits(tiny_model: DemoModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_checkpoint(tiny_model, tmp_path, torch.float32)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "DeepseekV2ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, _ = chain_batch(2, 10, 10, 60, torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, reference = tiny_model(ids), theirs.eval()(ids).logits
    assert reference.std() > 0.05
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_transformers_tokenizer_adds_bos(tiny_model: DemoModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_checkpoint(tiny_model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    example = make_example(random.Random(2), 8, 8, 5)
    assert tokenizer(example.prompt).input_ids == example.prompt_ids
    assert tokenizer.decode(example.answer_ids, skip_special_tokens=True) == example.answer


def test_last_positions_are_a_suffix_of_all(tiny_model: DemoModel) -> None:
    ids, hops = chain_batch(2, 5, 5, 0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(ids, last=hops), tiny_model(ids)[:, -hops:])


def test_committed_checkpoint_is_small_and_shaped_for_mla_kernels() -> None:
    files = [path for path in CHECKPOINT.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    stored = json.loads((CHECKPOINT / "config.json").read_text())
    assert (stored["kv_lora_rank"], stored["qk_rope_head_dim"]) == (512, 64)
    assert (stored["qk_nope_head_dim"], stored["v_head_dim"]) == (64, 128)
    assert stored["first_k_dense_replace"] == stored["num_hidden_layers"]
    built = json.loads(build_tokenizer().to_str())
    assert json.loads((CHECKPOINT / "tokenizer.json").read_text())["model"] == built["model"]


def test_committed_checkpoint_recalls_chains() -> None:
    """Greedy exact match in bfloat16 on examples from a seed that neither training nor its evaluation used.

    Teacher-forced: arg-max equal to the answer at every position is the same as greedy decoding giving the whole walk,
    because each greedy step then sees exactly the teacher's tokens (evals/models/evaluate.py).
    """
    model = load_checkpoint(CHECKPOINT, torch.bfloat16)
    score = score_case(model, links=64, hops=64, total=None, examples=96, seed=20261121)
    assert score.exact_match >= 0.98, score


def test_committed_checkpoint_recalls_chains_across_2k_tokens() -> None:
    score = score_case(load_checkpoint(CHECKPOINT, torch.float32), 64, 64, total=2048, examples=6, seed=20)
    assert score.token_accuracy >= 0.98, score


def test_committed_checkpoint_in_transformers_decodes_greedily() -> None:
    """Step by step with a key-value cache, no teacher: the same as above at a smaller size."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    examples = [make_example(random.Random(100 + i), 24, 24) for i in range(4)]
    inputs = tokenizer([example.prompt for example in examples], return_tensors="pt")
    produced = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs.input_ids.shape[1] :]
    completions = tokenizer.batch_decode(produced, skip_special_tokens=True)
    assert [correct_hops(e, c) for e, c in zip(examples, completions, strict=True)] == [24] * 4

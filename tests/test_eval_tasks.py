# SPDX-License-Identifier: Apache-2.0
"""The offline tasks: their answers follow from their prompts, they have the length asked for, and their documents are
the same everywhere."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from typing import Any

import pytest

from evals.tasks import chain_recall, copying, generated_text, modular, needles, variable_tracking, words
from vllm_fusedmla.evaluation import documents


def test_words_begin_with_the_demo_models() -> None:
    assert words.WORDS[: len(chain_recall.WORDS)] == chain_recall.WORDS
    assert len(words.VOCAB) == len(words.WORDS) == 326 + 2 + 32 + 64


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


TASKS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "chain_recall": (chain_recall, {"links": 20, "hops": 9}, 400),
    "needles": (needles, {"keys": 6, "value_words": 3}, 300),
    "variable_tracking": (variable_tracking, {"chains": 5, "hops": 4}, 350),
    "copying": (copying, {"length": 30, "span": 11}, 200),
    "modular": (modular, {"terms": 12, "modulus": 7}, 180),
    "generated_text": (generated_text, {"entities": 5}, 250),
}


@pytest.mark.parametrize("name", TASKS)
def test_length_words_and_seed(name: str, seed: int) -> None:
    task, options, total = TASKS[name]
    prompt, answer = task.example(random.Random(seed), total=total, **options)
    ids = words.encode(f"{prompt} {answer}")
    assert len(ids) == total and chain_recall.UNK_ID not in ids
    assert task.example(random.Random(seed), total=total, **options) == (prompt, answer)
    assert task.example(random.Random(seed + 1), total=total, **options) != (prompt, answer)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "generated_text"])
def test_too_short_a_length_is_refused(name: str, rng: random.Random) -> None:
    task, options, _ = TASKS[name]
    prompt, answer = task.example(rng, total=None, **options)
    least = len(words.encode(f"{prompt} {answer}"))
    assert len(words.encode(" ".join(task.example(rng, total=least, **options)))) == least
    with pytest.raises(ValueError, match=f"total must be at least {least}"):
        task.example(rng, total=least - 1, **options)


def facts_of(prompt: str) -> list[list[str]]:
    """The facts `... ;` of a text, without filler, each a list of its words."""
    text = [word for word in prompt.rpartition("?")[0].split() if not word.startswith("w")]
    return [fact.split() for fact in " ".join(text).split(";") if fact.strip()]


def test_needles(rng: random.Random) -> None:
    for depth in (None, 0.0, 0.5, 1.0):
        prompt, answer = needles.example(rng, keys=9, value_words=5, total=500, depth=depth)
        known = {key: value for key, _, *value in facts_of(prompt)}
        key = prompt.split()[-2]
        assert known[key] == answer.split() and len(known) == 9 and all(len(v) == 5 for v in known.values())
        where = prompt.split().index(key) / len(prompt.split())
        if depth is not None:
            assert abs(where - depth) < 0.15


def test_variable_tracking(rng: random.Random) -> None:
    for depth in (None, 0.0, 0.5, 1.0):
        prompt, answer = variable_tracking.example(rng, chains=6, hops=5, total=900, depth=depth)
        value: dict[str, str] = {}
        for variable, _, source in facts_of(prompt):
            value[variable] = source if source.startswith("v") else value[source]  # assigned before it is handed on
        number = prompt.split()[-1]
        assert [variable for variable in value if value[variable] == number] == answer.split()
        assert len(answer.split()) == 6 and Counter(value.values()) == dict.fromkeys(value.values(), 6)
        places = [prompt.split().index(variable) / len(prompt.split()) for variable in answer.split()]
        if depth is not None:
            assert all(abs(place - depth) < 0.2 for place in places)


def test_copying(rng: random.Random) -> None:
    for depth in (None, 0.0, 1.0):
        prompt, answer = copying.example(rng, length=40, span=13, total=300, depth=depth)
        text, _, first = prompt.rpartition(" ? ")
        sequence = [word for word in text.split() if word.startswith("n")]
        start = sequence.index(first) + 1
        assert sequence[start : start + 13] == answer.split() and len(set(sequence)) == 40
        if depth is not None:
            assert (text.split()[0] == sequence[0]) == (depth == 0.0)
            assert (text.split()[-1] == sequence[-1]) == (depth == 1.0)


def test_modular(rng: random.Random) -> None:
    prompt, answer = modular.example(rng, terms=20, modulus=11, total=200)
    assert prompt.split()[:2] == ["mod", "v11"]
    facts = facts_of(prompt.removeprefix("mod v11 "))
    assert prompt.split()[-1] == facts[0][0]
    said = [facts[0][0], *answer.split()]
    assert said[::2] == [name for name, _ in facts]
    numbers = [int(number[1:]) for _, number in facts]
    assert [int(word[1:]) for word in said[1::2]] == [sum(numbers[: i + 1]) % 11 for i in range(20)]


def test_generated_text_follows_its_rules(rng: random.Random) -> None:
    prompt, text = generated_text.example(rng, total=8000, entities=4)
    said, plain, pairs = text.split(), [], Counter[tuple[str, str]]()
    assert prompt == ""
    for i, word in enumerate(said):
        if word.startswith("t"):
            plain.append(int(word[1:]))
        elif said[i - 1].startswith("t") and i + 1 < len(said):
            pairs[word, said[i + 1]] += 1
    assert all(b in generated_text.successors(a) for a, b in zip(plain, plain[1:], strict=False))
    entities = {entity for entity, _ in pairs}
    faithful = sum(max(count for (e, _), count in pairs.items() if e == entity) for entity in entities)
    assert len(entities) == 4 and 0.85 < faithful / pairs.total() < 0.98  # 0.9 + 0.1 / 4 expected
    assert 0.15 < 2 * pairs.total() / len(said) < 0.6


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (needles, {"keys": 52, "value_words": 4}),
        (variable_tracking, {"chains": 33}),
        (variable_tracking, {"chains": 16, "hops": 16}),
        (copying, {"length": 20, "span": 20}),
        (modular, {"modulus": 32}),
        (modular, {"terms": 0}),
        (generated_text, {"entities": 129}),
        (chain_recall, {"links": 257}),
        (needles, {"depth": 1.5}),
        (copying, {"depth": -0.1}),
    ],
)
def test_arguments_out_of_range(task: Any, options: dict[str, Any], rng: random.Random) -> None:
    with pytest.raises(ValueError, match="must be|span"):
        task.example(rng, **options)


@pytest.mark.parametrize("task", documents.GENERATORS)
def test_documents(task: str, seed: int) -> None:
    lengths = [700, 900]
    made = documents.documents(task, n=20, seed=seed, lengths=lengths)
    assert made == documents.documents(task, n=20, seed=seed, lengths=lengths)
    assert made[:7] == documents.documents(task, n=7, seed=seed, lengths=lengths)
    assert made != documents.documents(task, n=20, seed=seed + 1, lengths=lengths)
    sizes = [len(words.encode(f"{doc['prompt']} {doc['answer']}")) for doc in made]
    assert sizes == [doc["length"] for doc in made] == lengths * 10
    depths = {doc["depth"] for doc in made}
    assert depths == ({0.0, 0.25, 0.5, 0.75, 1.0} if task in ("needles", "variable_tracking") else {-1.0})
    assert len({(doc["length"], doc["depth"]) for doc in made}) == 2 * len(depths)


def test_documents_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="task must be one of chain_recall"):
        documents.documents("chains")
    with pytest.raises(ValueError, match="needles takes keys, value_words, got hops"):
        documents.documents("needles", hops=3)
    with pytest.raises(ValueError, match="modular has no depth"):
        documents.documents("modular", depths=[0.5])
    with pytest.raises(ValueError, match="n must be at least 1"):
        documents.documents("copy", n=0)


def test_score() -> None:
    doc = {"answer": "n001 n002 n003 n004"}
    assert documents.score(doc, " n001 n002 n003 n004 n009") == {"exact_match": 1.0, "prefix": 1.0}
    assert documents.score(doc, "n001 n002 n009 n004") == {"exact_match": 0.0, "prefix": 0.5}
    assert documents.score(doc, "n001 n002 n003") == {"exact_match": 0.0, "prefix": 0.75}
    assert documents.score(doc, "") == {"exact_match": 0.0, "prefix": 0.0}


@pytest.mark.parametrize("task", documents.GENERATORS)
def test_lm_eval_has_the_task(task: str, seed: int) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = importlib.import_module("vllm_fusedmla.evaluation.worker").TASKS_FOLDER
    name = documents.PREFIX + task
    given: dict[str, Any] = {"n": 3, "seed": seed, "lengths": [None if task in ("copy", "modular") else 900]}
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False, metadata={name: given})
    loaded = manager.load([name])["tasks"][name]
    docs = list(loaded.test_docs())
    assert [doc["answer"] for doc in docs] == [doc["answer"] for doc in documents.documents(task, **given)]
    if task == "text":
        assert loaded.OUTPUT_TYPE == "loglikelihood_rolling" and loaded.doc_to_target(docs[0]) == docs[0]["answer"]
    else:
        assert loaded.doc_to_text(docs[0]) == docs[0]["prompt"]
        assert loaded.process_results(docs[0], [docs[0]["answer"]]) == {"exact_match": 1.0, "prefix": 1.0}

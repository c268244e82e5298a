# SPDX-License-Identifier: Apache-2.0
"""One run of `fusedmla eval` in a process of its own: lm-eval's tasks, or teacher forcing.

python -m vllm_fusedmla.evaluation.worker REQUEST.json RESULT_FOLDER

Every finished task is a file of the result folder, so a run that was interrupted goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_fusedmla.counts import read_counts
from vllm_fusedmla.evaluation import documents, workarounds
from vllm_fusedmla.evaluation.configurations import ENVIRONMENT, task_file

TASKS_FOLDER = Path(__file__).resolve().parent / "lm_tasks"
_KEPT_RESPONSE = 400


def engine_options(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM's options of the run: the settings', the variant's, backend and cache."""
    run, settings = request["run"], request["settings"]
    options = {
        "seed": settings["seed"],
        **settings["model_args"],
        **settings["variants"].get(run["variant"], {}),
        "attention_backend": run["backend"],
        "kv_cache_dtype": run["kv_cache_dtype"],
    }
    options.pop(ENVIRONMENT, None)
    if run["fault"]:
        # vLLM imports this in the process that loads the model, before it does.
        options["worker_extension_cls"] = "vllm_fusedmla.evaluation.fault_hook.Extension"
    return workarounds.cpu_rotary_op(options)


def decoded(since: dict[str, int] | None = None) -> dict[str, int]:
    """Tokens that FUSEDMLA decoded, by kernel, since `since`."""
    folder = os.environ.get("FUSEDMLA_COUNT_DIR")
    now = read_counts(Path(folder)) if folder else {}
    return {kernel: tokens - (since or {}).get(kernel, 0) for kernel, tokens in now.items()}


def versions() -> dict[str, str]:
    import lm_eval
    import torch
    import vllm

    import vllm_fusedmla

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"vllm": vllm.__version__, "torch": torch.__version__, "lm_eval": lm_eval.__version__, "device": device}
    return found | {"vllm_fusedmla": vllm_fusedmla.__version__}


def task_manager(settings: dict[str, Any]) -> Any:
    """lm-eval's tasks, those of this package and those of `include_path`."""
    from lm_eval.tasks import TaskManager

    paths = [str(TASKS_FOLDER), *settings["include_path"]]
    metadata = {"pretrained": settings["model"], **settings["task_args"]}
    return TaskManager(include_path=paths, metadata=metadata)


def sample_rows(samples: list[dict[str, Any]], higher_is_better: dict[str, bool]) -> list[dict[str, Any]]:
    """What the comparison needs of lm-eval's samples: which prompt, the answer, the value of each metric.

    Values are turned so that larger is better. Metrics whose values are no numbers are left out; a perplexity's, a
    log-likelihood and a number of words or bytes, becomes the log-likelihood of one.
    """
    rows = []
    for sample in samples:
        values = {}
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, (tuple, list)) and len(value) == 2 and metric.endswith(("perplexity", "per_byte")):
                values[f"log-likelihood ({metric})"] = value[0] / value[1]
            elif isinstance(value, (bool, int, float)):
                values[metric] = float(value) * (1 if higher_is_better.get(metric, True) else -1)
        answer = json.dumps(sample["filtered_resps"])
        doc = sample["doc"] if isinstance(sample["doc"], dict) else {}
        rows.append(
            {
                "id": [sample["doc_hash"], sample["prompt_hash"], sample["filter"]],
                "values": values,
                "answer": hashlib.sha256(answer.encode()).hexdigest()[:16],
                "text": answer[:_KEPT_RESPONSE],
                "where": {name: doc[name] for name in ("length", "depth") if isinstance(doc.get(name), (int, float))},
            }
        )
    return rows


def generation_arguments(task: str, settings: dict[str, Any], model: Any) -> dict[str, Any] | None:
    """For tasks of this package: as many tokens as the longest answer has."""
    given = settings["gen_kwargs"] or {}
    name = task.removeprefix(documents.PREFIX)
    if not task.startswith(documents.PREFIX) or name not in documents.GENERATORS or name == "text":
        return given or None
    answers = [doc["answer"] for doc in documents.documents(name, **settings["task_args"].get(task, {}))]
    lengths = [len(ids) for ids in model.tok_encode(answers, add_special_tokens=False)]
    return {"max_gen_toks": max(lengths)} | given


def run_tasks(request: dict[str, Any], folder: Path) -> None:
    """Run every task that has no file in `folder` yet."""
    settings = request["settings"]
    todo = [task for task in settings["tasks"] if not (folder / task_file(task)).exists()]
    if not todo:
        return
    import lm_eval
    from lm_eval.models.vllm_causallms import VLLM

    begin = time.monotonic()
    options = {"pretrained": settings["model"], "batch_size": "auto", **engine_options(request)}
    model = VLLM(**options)
    manager = task_manager(settings)
    start_seconds = time.monotonic() - begin
    for task in todo:
        print(f"fusedmla eval: task {task}", flush=True)
        before, begin = decoded(), time.monotonic()
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            apply_chat_template=settings["apply_chat_template"],
            fewshot_as_multiturn=settings["apply_chat_template"],
            gen_kwargs=generation_arguments(task, settings, model),
            bootstrap_iters=0,
            log_samples=True,
            random_seed=settings["seed"],
            numpy_random_seed=settings["seed"],
            torch_random_seed=settings["seed"],
            fewshot_random_seed=settings["seed"],
            confirm_run_unsafe_code=settings["confirm_run_unsafe_code"],
        )
        assert found is not None
        higher = found["higher_is_better"]
        result = {
            "versions": versions(),
            "start_seconds": round(start_seconds, 1),
            "seconds": round(time.monotonic() - begin, 1),
            "decoded": decoded(before),
            "results": {name: _numbers(values) for name, values in found["results"].items()},
            "samples": {name: sample_rows(rows, higher.get(name, {})) for name, rows in found["samples"].items()},
        }
        _write(folder / task_file(task), result)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def texts_of_task(task: str, settings: dict[str, Any], count: int) -> list[str]:
    """Prompt and right answer of the first documents of a task, as one text each."""
    # The first of more documents are the same documents: none need be drawn in vain.
    given = settings["task_args"].get(task, {})
    if task.removeprefix(documents.PREFIX) in documents.GENERATORS and given.get("n", count) >= count:
        settings = settings | {"task_args": {**settings["task_args"], task: given | {"n": count}}}
    loaded = task_manager(settings).load([task])["tasks"]
    texts: list[str] = []
    for found in loaded.values():
        docs = found.test_docs() if found.has_test_docs() else found.validation_docs()
        for doc, _ in zip(docs, range(count), strict=False):
            prompt, target = found.doc_to_text(doc), found.doc_to_target(doc)
            if isinstance(target, int):  # the right choice's number
                target = found.doc_to_choice(doc)[target]
            target = target[0] if isinstance(target, list) else target
            texts.append(f"{prompt} {target}".strip())
    return texts[:count]


def teacher_tokens(tokenizer: Any, settings: dict[str, Any]) -> list[list[int]]:
    """The texts to decode as lists of ids: a file cut into pieces, or the beginnings of a task's documents."""
    teacher = settings["teacher"]
    length, count = teacher["length"], teacher["texts"]
    path = Path(teacher["source"])
    if not path.is_file():
        texts = texts_of_task(teacher["source"], settings, count)
        tokens = [tokenizer.encode(text)[:length] for text in texts]
    else:
        ids = tokenizer.encode(path.read_text())
        tokens = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    tokens = [ids for ids in tokens if len(ids) > teacher["prompt"]]
    if not tokens:
        raise ValueError(f"{teacher['source']}: no text of more than {teacher['prompt']} tokens")
    return tokens


def run_teacher(request: dict[str, Any], folder: Path) -> None:
    """Decode the texts and save the log-probabilities, unless that is done."""
    if (folder / "teacher.json").exists():
        return
    import numpy as np
    from vllm import LLM, SamplingParams

    from vllm_fusedmla.evaluation.divergence import Forced
    from vllm_fusedmla.evaluation.teacher import KEY

    settings = request["settings"]
    teacher = settings["teacher"]
    begin = time.monotonic()
    options = engine_options(request) | {
        "logits_processors": ["vllm_fusedmla.evaluation.teacher:Teacher"],
        "max_logprobs": -1,
        # What a request has said so far must be known when its next token is due.
        "async_scheduling": False,
        # A prefix that another text left in the cache would not be decoded.
        "enable_prefix_caching": False,
    }
    llm = LLM(model=settings["model"], **options)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    top = vocabulary if teacher["top"] < 0 else min(teacher["top"], vocabulary)
    tokens, prompt = teacher_tokens(llm.get_tokenizer(), settings), teacher["prompt"]
    start_seconds = time.monotonic() - begin
    before, begin = decoded(), time.monotonic()
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=len(ids) - prompt,
            ignore_eos=True,
            detokenize=False,
            logprobs=top,
            extra_args={KEY: ids[prompt:]},
        )
        for ids in tokens
    ]
    outputs = llm.generate([{"prompt_token_ids": ids[:prompt]} for ids in tokens], params, use_tqdm=True)
    columns: list[list[Any]] = [[] for _ in range(6)]
    for text, (ids, output) in enumerate(zip(tokens, outputs, strict=True)):
        completion = output.outputs[0]
        if list(completion.token_ids) != ids[prompt:]:
            raise RuntimeError("the engine did not decode the given text: its logits processor had no effect")
        for place, (token, step) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            best = sorted(((entry.logprob, -other) for other, entry in step.items()), reverse=True)[:top]
            row = (text, prompt + place, token, step[token].logprob, [-t for _, t in best], [lp for lp, _ in best])
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    types = {"text": "i4", "position": "i4", "token": "i4", "logprob": "f4", "top_tokens": "i4", "top_logprobs": "f4"}
    arrays = {name: np.array(column, dtype=types[name]) for name, column in zip(types, columns, strict=True)}
    if not np.isfinite(arrays["logprob"]).all():
        raise RuntimeError("log-probabilities of the text are not finite")
    Forced(**arrays, whole=top >= vocabulary).save(folder / "teacher.npz")
    result = {
        "versions": versions(),
        "start_seconds": round(start_seconds, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "decoded": decoded(before),
        "texts": len(tokens),
        "tokens": len(arrays["token"]),
    }
    _write(folder / "teacher.json", result)


def _write(path: Path, result: dict[str, Any]) -> None:
    """Under its name only once it is whole: a killed process must not leave half a result."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(path)


def main() -> None:
    """Run what the request says; the reason of a failure is in error.json."""
    request, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    work: Callable[[dict[str, Any], Path], None] = run_teacher if request["run"]["teacher"] else run_tasks
    code = 0
    try:
        work(request, folder)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        _write(folder / "error.json", {"error": f"{type(error).__name__}: {lines[0]}"[:400]})
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the results are saved; an engine's orderly end takes seconds and may hang


if __name__ == "__main__":
    main()

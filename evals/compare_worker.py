# SPDX-License-Identifier: Apache-2.0
"""One job of `compare_backends`: start an engine in this process, answer the prompts, save what came out.

python evals/compare_worker.py '{"job": {...}, "name": ..., "settings": {...}}' RESULT.json
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import random
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from evals.tasks.chain_recall import Example, filler_for_length, make_example, total_tokens

MAX_LINKS = 64
KERNELS = re.compile(r"[\w:]*(mla|swapab|twowg|sparse|FlashAttn|logits|topk)\w*", re.IGNORECASE)
"""Names of kernels of attention and of the indexer, this project's and others'."""
SAMPLING = re.compile(r"sbtopk|log_softmax")
PROFILED_PROMPTS, PROFILED_TOKENS = 4, 8
TOP = 5
"""Most probable tokens saved with each answered token."""
INVARIANCE_BATCH = 32
INVARIANCE_MAX_PROMPT = 3072
"""Longest prompt of the batch-invariance job: the whole batch must be prefilled in one step, as the prompt alone is."""


def make_prompts(count: int, longest: int, hops: int, seed: int) -> list[Example]:
    """Chain-recall prompts of mixed length: 64 links each, stretched by filler to lengths spread evenly in logarithm.

    Args:
        count: how many; the order of lengths is shuffled.
        longest: tokens of the longest prompt with its answer.
        hops: tokens of an answer.
        seed: equal arguments give equal prompts on every machine.
    """
    rng = random.Random(seed)
    links = min(MAX_LINKS, (longest - total_tokens(0, hops)) // 3)
    shortest = total_tokens(links, hops)
    lengths = [round(shortest * (longest / shortest) ** (i / max(count - 1, 1))) for i in range(count)]
    rng.shuffle(lengths)
    return [make_example(rng, links, hops, filler_for_length(links, hops, length)) for length in lengths]


class DecodeRecorder:
    """Counts, in this process, decode batches that vLLM's MLA metadata builders prepare, and replays of CUDA graphs."""

    def __init__(self) -> None:
        self.steps = 0
        self.replays = 0
        self.tokens = 0
        self.largest_batch = 0
        self.query_lens: collections.Counter[int] = collections.Counter()
        self._inside = False

    def install(self) -> None:
        """Wrap `_build_decode` of the builders that are loaded. Call it when the engine has started."""
        from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder
        from vllm.model_executor.layers.attention.sparse_mla_attention import SparseMLACommonMetadataBuilder

        for base, method, wrap in (
            (MLACommonMetadataBuilder, "_build_decode", self._wrap),
            (SparseMLACommonMetadataBuilder, "build", self._wrap_sparse),
        ):
            queue = [base]
            while queue:
                builder = queue.pop()
                queue += builder.__subclasses__()
                if method in vars(builder):
                    wrap(builder)
        import torch

        replay = torch.cuda.CUDAGraph.replay

        def counted_replay(graph: Any) -> None:
            self.replays += 1
            replay(graph)

        torch.cuda.CUDAGraph.replay = counted_replay  # type: ignore[method-assign, assignment]

    def _wrap(self, builder: Any) -> None:
        original = builder._build_decode

        def build_decode(instance: Any, *args: Any, **kwargs: Any) -> Any:
            outer = not self._inside  # a builder may call its base class's
            self._inside = True
            try:
                if outer:
                    self._count(kwargs)
                return original(instance, *args, **kwargs)
            finally:
                self._inside = not outer

        builder._build_decode = build_decode

    def _wrap_sparse(self, builder: Any) -> None:
        original = builder.build

        def build(instance: Any, *args: Any, **kwargs: Any) -> Any:
            outer = not self._inside
            self._inside = True
            try:
                metadata = original(instance, *args, **kwargs)
            finally:
                self._inside = not outer
            if outer and metadata.num_decode_tokens:
                self._add(metadata.num_decodes, metadata.num_decode_tokens)
            return metadata

        builder.build = build

    def _count(self, kwargs: dict[str, Any]) -> None:
        self._add(kwargs["seq_lens_device"].shape[0], kwargs["num_decode_tokens"])

    def _add(self, requests: int, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens
        self.largest_batch = max(self.largest_batch, requests)
        self.query_lens[tokens // max(requests, 1)] += 1

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "largest_batch": self.largest_batch,
            "graph_replays": self.replays,
            "steps_by_query_len": {str(length): steps for length, steps in sorted(self.query_lens.items())},
        }


def engine_options(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vllm.LLM."""
    invariance = job["kind"] != "generate"
    longest = min(INVARIANCE_MAX_PROMPT, settings["max_prompt"]) if invariance else settings["max_prompt"]
    options: dict[str, Any] = {
        "model": job["model"],
        "attention_backend": job["backend"],
        "kv_cache_dtype": job["kv_cache_dtype"],
        "max_model_len": _max_model_len(job["model"], longest + 64),
        "max_num_seqs": settings["max_num_seqs"],
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": int(settings["kv_cache_gib"] * 2**30),
        "seed": 0,
    }
    if settings["block_size"]:
        options["block_size"] = settings["block_size"]
    if invariance:
        # Cached prefixes and chunks of prompts would split the prefill differently alone and in a batch.
        options["enable_prefix_caching"] = False
        options["max_num_batched_tokens"] = INVARIANCE_BATCH * options["max_model_len"]
    if job["mode"] == "eager":
        options["enforce_eager"] = True
    else:
        per_request = 1 + job["spec_tokens"]
        sizes = sorted({n * per_request for n in (1, 2, 4, 8, 16, 32, 48, 64) if n <= settings["max_num_seqs"]})
        # Without compilation the start takes seconds, and what is captured is the same decode.
        options["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        }
    if job["spec_tokens"]:
        # Every node of an answer occurs in its prompt, so there is always something to propose.
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": job["spec_tokens"],
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        }
    return options


def _max_model_len(model: str, wanted: int) -> int:
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    return min(wanted, config["max_position_embeddings"])


def answers(outputs: list[Any], examples: list[Example]) -> list[dict[str, Any]]:
    """Tokens, their log-probabilities and the most probable alternatives of each output."""
    rows = []
    for output, example in zip(outputs, examples, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        steps = completion.logprobs or []
        rows.append(
            {
                "prompt_tokens": len(output.prompt_token_ids),
                "tokens": tokens,
                "logprobs": [step[token].logprob for step, token in zip(steps, tokens, strict=True)],
                "top": [{str(token): entry.logprob for token, entry in step.items()} for step in steps],
                "right": tokens == example.answer_ids,
            }
        )
    return rows


def generate(llm: Any, examples: list[Example], hops: int) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=hops, ignore_eos=True, logprobs=TOP)
    prompts = [{"prompt_token_ids": example.prompt_ids} for example in examples]
    return answers(llm.generate(prompts, params, use_tqdm=False), examples)


def bits_alone_and_together(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Answers to some prompts alone, inside a batch, and inside the batch in another order: equal bits or not."""
    hops = settings["max_tokens"]
    examples = make_prompts(
        INVARIANCE_BATCH, min(INVARIANCE_MAX_PROMPT, settings["max_prompt"]), hops, settings["seed"]
    )
    together = generate(llm, examples, hops)
    order = random.Random(settings["seed"]).sample(range(len(examples)), len(examples))
    shuffled = dict(zip(order, generate(llm, [examples[i] for i in order], hops), strict=True))
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    chosen = by_length[:: max(len(by_length) // 7, 1)]
    rows = []
    for index in chosen:
        alone = generate(llm, [examples[index]], hops)[0]
        for other, where in ((together[index], "batch"), (shuffled[index], "shuffled batch")):
            rows.append(
                {
                    "prompt_tokens": alone["prompt_tokens"],
                    "against": where,
                    "same_tokens": alone["tokens"] == other["tokens"],
                    "same_bits": (alone["tokens"], alone["logprobs"], alone["top"])
                    == (other["tokens"], other["logprobs"], other["top"]),
                    "max_logprob_difference": max(
                        abs(a - b) for a, b in zip(alone["logprobs"], other["logprobs"], strict=True)
                    ),
                }
            )
    return {"batch": len(examples), "comparisons": rows}


def versions() -> dict[str, str]:
    import torch
    import vllm

    found = {"torch": torch.__version__, "vllm": vllm.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = ""
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return found


def fusedmla_counters() -> collections.Counter[str]:
    """What FUSEDMLA's backends say they have done in this process; empty if they were not loaded.

    "tokens", "scheduled", and decoded tokens by kernel under names such as "sparse twowg_gather".
    """
    found: collections.Counter[str] = collections.Counter()
    for module, name in (("backend", "decode_tokens"), ("sparse_metadata", "sparse_tokens")):
        counter = getattr(sys.modules.get(f"vllm_fusedmla.{module}"), name, None)
        if counter is not None:
            found.update({"tokens": counter.tokens, "scheduled": counter.scheduled})
            found.update({f"{counter.name} {kernel}": tokens for kernel, tokens in counter.by_kernel.items()})
    return found


def kernels_seen(call: Callable[[], Any]) -> dict[str, int]:
    """Launches, by name, of the attention's and the indexer's kernels on the GPU during `call`, those of graphs too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
    counts: collections.Counter[str] = collections.Counter()
    for event in recorded.key_averages():
        found = KERNELS.search(event.key)
        if found and not SAMPLING.search(event.key):
            counts[found[0].strip(":")] += event.count
    return dict(counts.most_common())


def run(request: dict[str, Any]) -> dict[str, Any]:
    job, settings = request["job"], request["settings"]
    begin = time.monotonic()
    from vllm import LLM

    options = engine_options(job, settings)
    llm = LLM(**options)
    config = llm.llm_engine.vllm_config
    result: dict[str, Any] = {
        **request,
        "status": "ok",
        "versions": versions(),
        "start_seconds": round(time.monotonic() - begin, 1),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "block_size": config.cache_config.block_size,
    }
    recorder = DecodeRecorder()
    recorder.install()
    before = fusedmla_counters()
    begin = time.monotonic()
    if job["kind"] == "generate":
        longest = min(settings["max_prompt"], options["max_model_len"] - 16)  # room for drafts past an answer's end
        examples = make_prompts(settings["prompts"], longest, settings["max_tokens"], settings["seed"])
        result["answers"] = generate(llm, examples, settings["max_tokens"])
        finite = all(math.isfinite(value) for row in result["answers"] for value in row["logprobs"])
        if not finite:
            result |= {"status": "error", "error": "log-probabilities are not finite"}
    else:
        result["invariance"] = bits_alone_and_together(llm, settings)
    result["generate_seconds"] = round(time.monotonic() - begin, 2)
    result["decode"] = recorder.summary()
    result["fusedmla"] = dict(fusedmla_counters() - before)
    if job["kind"] == "generate":
        chosen = sorted(examples, key=lambda example: len(example.prompt_ids))[-PROFILED_PROMPTS:]
        try:
            result["kernels"] = kernels_seen(lambda: generate(llm, chosen, PROFILED_TOKENS))
        except Exception as error:  # the answers are what counts
            result["kernels"] = {f"not profiled: {type(error).__name__}": 0}
    return result


def work(task: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Run `task` on the request of the command line, save its result or its error, and end the process."""
    request, path = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    code = 0
    try:
        result = task(request)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        # An engine's failure often arrives wrapped; the log beside the result has the rest.
        result = {**request, "status": "error", "error": f"{type(error).__name__}: {lines[0]}"[:400]}
        code = 1
    path.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the result is saved; an engine's orderly end takes seconds and may hang


if __name__ == "__main__":
    work(run)

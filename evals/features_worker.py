# SPDX-License-Identifier: Apache-2.0
"""One feature of `check_features`: an engine in processes of its own, what it answered, and how each rank worked.

python evals/features_worker.py '{"feature": {...}, "settings": {...}}' RESULT.json
"""

from __future__ import annotations

import multiprocessing
import pathlib
import re
import sys
import time
from collections import Counter
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from evals import compare_worker


class StepRecorder:
    """Counts, in a worker process, the steps that FUSEDMLA prepares, by what is in them."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.most_tokens = 0
        self.graphs = compare_worker.DecodeRecorder()

    def install(self) -> None:
        """Wrap `build` of FUSEDMLA's metadata builder and the replay of CUDA graphs."""
        from vllm_fusedmla.metadata import FusedMLAMetadataBuilder

        self.graphs.install()
        original = FusedMLAMetadataBuilder.build

        def build(builder: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = original(builder, *args, **kwargs)
            self.count(metadata)
            return metadata

        FusedMLAMetadataBuilder.build = build  # type: ignore[method-assign]

    def count(self, metadata: Any) -> None:
        """Add one step: "decode", "prefill" or "mixed", and "context" where a prompt goes on after a cached part."""
        decodes, prefills = metadata.num_decodes > 0, metadata.num_prefills > 0
        self.kinds["mixed" if decodes and prefills else "prefill" if prefills else "decode"] += 1
        if prefills and metadata.prefill.chunked_context is not None:
            self.kinds["context"] += 1
        self.most_tokens = max(self.most_tokens, metadata.num_actual_tokens)


_recorder: StepRecorder | None = None


def start_recording(worker: Any) -> None:
    """Runs in every rank once its engine has started (`LLM.collective_rpc`)."""
    global _recorder
    _recorder = StepRecorder()
    _recorder.install()


def rank_report(worker: Any) -> dict[str, Any]:
    """How this rank works and what it has done since `start_recording`; runs in every rank."""
    config = worker.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
    assert _recorder is not None
    return {
        "process": type(multiprocessing.current_process()).__name__,
        "configured_backend": getattr(config.attention_config.backend, "name", None),
        "impls": sorted({type(impl).__name__ for impl in impls}),
        "heads": sorted({impl.num_heads for impl in impls}),
        "dcp": sorted({getattr(impl, "dcp_world_size", 1) for impl in impls}),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "block_size": config.cache_config.block_size,
        "steps": dict(_recorder.kinds),
        "most_tokens_in_a_step": _recorder.most_tokens,
        "graph_replays": _recorder.graphs.replays,
        "fusedmla": compare_worker.fusedmla_counters(),
        "nccl_binding": nccl_binding(),
        "versions": compare_worker.versions(),
    }


def nccl_binding() -> bool | None:
    """Whether vLLM's own NCCL binding is in use (None: one rank), see `nccl_fallback`."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    binding = getattr(group.device_communicator, "pynccl_comm", None)
    return None if group.world_size == 1 else binding is not None and not binding.disabled


def engine_options(feature: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vllm.LLM: those of `compare_backends`, then the feature's own."""
    job = {
        "kind": "generate",
        "model": feature["model"],
        "backend": "FUSEDMLA",
        "kv_cache_dtype": feature["kv_cache_dtype"],
        "mode": feature["mode"],
        "spec_tokens": 0,
    }
    options = compare_worker.engine_options(job, settings)
    options["enable_prefix_caching"] = False
    options |= feature["options"]
    if "attention_config" in feature["options"]:
        del options["attention_backend"]  # asked for the other way
    return options


def generate_twice(feature: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and answer the prompts as often as the feature says."""
    from vllm import LLM, SamplingParams

    begin = time.monotonic()
    options = engine_options(feature, settings)
    llm = LLM(**options)
    result: dict[str, Any] = {"start_seconds": round(time.monotonic() - begin, 1)}
    llm.collective_rpc(start_recording)
    hops = settings["max_tokens"]
    longest = min(settings["max_prompt"], options["max_model_len"] - 16)
    examples = compare_worker.make_prompts(settings["prompts"], longest, hops, settings["seed"])
    params = SamplingParams(temperature=0.0, max_tokens=hops, ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": example.prompt_ids} for example in examples]
    passes = []
    for _ in range(feature["passes"]):
        begin = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        rows = compare_worker.answers(outputs, examples)
        for row in rows:
            del row["top"]
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        passes.append({"seconds": round(time.monotonic() - begin, 2), "cached_tokens": cached, "answers": rows})
    return {**result, "passes": passes, "ranks": llm.collective_rpc(rank_report)}


def serve(feature: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The demo's server, `vllm serve` over HTTP, and one completion request of every length that the demo has."""
    import random

    from evals.tasks.chain_recall import make_example
    from scripts import demo

    port = demo.free_port()
    command = demo.serve_command(port, feature["kv_cache_dtype"], on_gpu=feature["mode"] != "eager")
    # A fixed amount of memory, so that other engines may start beside it.
    memory = int(settings["kv_cache_gib"] * 2**30)
    command += ["--kv-cache-memory-bytes", str(memory), "--gpu-memory-utilization", "0.1"]
    log = pathlib.Path(feature["log"])
    rng = random.Random(settings["seed"])
    with demo.server(command, log) as process:
        url = f"http://127.0.0.1:{port}"
        started = demo.wait_until_healthy(process, url, feature["timeout"] - 30)  # before this process is killed
        examples = [make_example(rng, links, links // 2) for links in demo.LINKS]
        right = [demo.ask(url, example, number) for number, example in enumerate(examples, 1)]
    found = demo.evidence_in(log)
    # What vLLM writes before a message (process, time, file) is noise here.
    evidence = {mark: re.sub(f"^.*?(?={re.escape(mark)})", "", line) for mark, line in found.items()}
    shown = ["vllm", *command[command.index("serve") :]]
    return {"start_seconds": round(started, 1), "right": right, "evidence": evidence, "command": " ".join(shown)}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One feature: its request as `check_features` writes it."""
    feature, settings = request["feature"], request["settings"]
    return (serve if feature["serve"] else generate_twice)(feature, settings)


if __name__ == "__main__":
    # By its importable name: functions that travel to the ranks must be found there.
    from evals import features_worker

    compare_worker.work(features_worker.run)

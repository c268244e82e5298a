# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on a CPU: the demo model through FUSEDMLA and through vLLM's own CPU_MLA, and once over HTTP.

Each engine runs in a process of its own (vLLM starts its workers by spawn there), one at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:  # `evals` is not part of the installed package
    sys.path.insert(0, str(REPO))

from evals.tasks.chain_recall import correct_hops, decode, encode, make_example  # noqa: E402

MODEL = REPO / "evals" / "models" / "demo"
NO_ROTARY_OP = {"custom_ops": ["-rotary_embedding"]}  # see compat.disable_cpu_rotary_op; other backends need it by hand

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)
if not (MODEL / "model.safetensors").is_file():
    pytest.skip("the demo model is not part of this checkout", allow_module_level=True)

GENERATE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    request = json.load(sys.stdin)
    llm = LLM(**request["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    settings = SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=1, ignore_eos=True)
    answers = [output.outputs[0] for output in llm.generate(prompts, settings, use_tqdm=False)]
    logprobs = [[step[token].logprob for token, step in zip(a.token_ids, a.logprobs)] for a in answers]
    print("ANSWERS", json.dumps([[list(a.token_ids) for a in answers], logprobs]))

if __name__ == "__main__":
    main()
"""


def engine_env(env: dict[str, str]) -> dict[str, str]:
    """A small KV cache, no network; the plugin comes by its entry points or not at all."""
    return env | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    """Chain recall of several lengths, and prompts so short that they are decoded, not prefilled."""
    rng = random.Random(20260)
    return [make_example(rng, links, 12, filler) for links, filler in ((16, 0), (33, 7), (48, 100), (64, 0), (64, 300))]


SHORT_PROMPTS = [encode("n001 n002 ; ? n001"), encode("? n003")]


class Engine:
    """Runs an engine per distinct set of options and keeps its answers."""

    def __init__(self, folder: Path, prompts: list[Any]) -> None:
        self.script, self.prompts, self.done = folder / "generate.py", prompts, dict[str, Any]()
        # A file, not standard input: spawned workers import the main module again.
        self.script.write_text(GENERATE)

    def run(self, **options: Any) -> subprocess.CompletedProcess[str]:
        """Generate with an engine of its own; the process's result."""
        env = engine_env({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
        engine = {"model": str(MODEL), "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True, **options}
        ids = [example.prompt_ids for example in self.prompts] + SHORT_PROMPTS
        request = json.dumps({"engine": engine, "prompts": ids, "max_tokens": 12})
        command = [sys.executable, str(self.script)]
        return subprocess.run(command, input=request, env=env, capture_output=True, text=True, timeout=400)

    def answers(self, **options: Any) -> tuple[list[list[int]], list[list[float]], str]:
        """Token ids and their log-probabilities for all prompts, and everything the engine logged."""
        key = json.dumps(options)
        if key not in self.done:
            result = self.run(**options)
            log = result.stdout + result.stderr
            assert result.returncode == 0, log[-6000:]
            line = next(line for line in result.stdout.splitlines() if line.startswith("ANSWERS "))
            self.done[key] = (*json.loads(line.removeprefix("ANSWERS ")), log)
        return self.done[key]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, prompts: list[Any]) -> Engine:
    return Engine(tmp_path_factory.mktemp("engine"), prompts)


def share_right(prompts: list[Any], tokens: list[list[int]]) -> float:
    hops = [correct_hops(example, decode(ids)) for example, ids in zip(prompts, tokens, strict=False)]
    return sum(hops) / sum(len(example.answer_ids) for example in prompts)


def test_same_tokens_as_cpu_mla(engine: Engine, prompts: list[Any]) -> None:
    tokens, logprobs, log = engine.answers(attention_backend="FUSEDMLA")
    stock_tokens, stock_logprobs, stock_log = engine.answers(
        attention_backend="CPU_MLA", compilation_config=NO_ROTARY_OP
    )
    assert share_right(prompts, tokens) >= 0.95
    assert tokens[: len(prompts)] == stock_tokens[: len(prompts)]
    # The short prompts ask for nothing that the model learnt: near ties, where a rounding may turn a token. Their
    # first token comes from the multi-token decode and must agree.
    assert [ids[0] for ids in tokens] == [ids[0] for ids in stock_tokens]
    answers = range(len(prompts))
    pairs = [pair for i in answers for pair in zip(logprobs[i], stock_logprobs[i], strict=True)]
    pairs += [(a[0], b[0]) for a, b in zip(logprobs, stock_logprobs, strict=True)]
    assert max(abs(a - b) for a, b in pairs) < 0.05
    for line in ("Using FUSEDMLA backend", "FUSEDMLA: dense MLA decode by the kernel", "FUSEDMLA: first decode"):
        assert log.count(line) == 1, line
        assert line not in stock_log
    assert "Unknown vLLM environment variable" not in log
    assert "Using CPU_MLA backend" in stock_log


@pytest.mark.parametrize(
    ("kv_cache_dtype", "cache"), [("fp8", "576] in float8_e4m3fn"), ("fp8_ds_mla", "656] in uint8")]
)
def test_fp8_cache(engine: Engine, prompts: list[Any], kv_cache_dtype: str, cache: str) -> None:
    tokens, logprobs, log = engine.answers(attention_backend="FUSEDMLA", kv_cache_dtype=kv_cache_dtype)
    exact_tokens, exact_logprobs, _ = engine.answers(attention_backend="FUSEDMLA")
    assert f", {cache}, PyTorch reference" in log
    assert share_right(prompts, tokens) >= 0.9
    same = [a == b for i in range(len(prompts)) for a, b in zip(tokens[i], exact_tokens[i], strict=True)]
    assert sum(same) / len(same) >= 0.9
    # The answer's first token is prefilled, without the cache's rounding; the second is decoded from the fp8 cache.
    second = [abs(logprobs[i][1] - exact_logprobs[i][1]) for i in range(len(prompts))]
    assert all(difference < 0.5 for difference in second) and any(difference > 0 for difference in second), second


def test_unsupported_model_is_refused_at_start(engine: Engine, tmp_path: Path) -> None:
    config = json.loads((MODEL / "config.json").read_text()) | {"kv_lora_rank": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = engine.run(
        model=str(tmp_path), attention_backend="FUSEDMLA", load_format="dummy", skip_tokenizer_init=True
    )
    assert result.returncode != 0
    assert "FUSEDMLA cannot serve this configuration: head size 320 is not 576" in result.stdout + result.stderr


@contextlib.contextmanager
def serving(folder: Path, env: dict[str, str], *options: str) -> Iterator[tuple[str, Path]]:
    """`vllm serve` on a free port until the block ends: its address and its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL), "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, cwd=folder, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
            with contextlib.suppress(OSError):
                get(f"{url}/health")
                break
            time.sleep(0.5)
        yield url, log
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def get(url: str, body: dict[str, Any] | None = None) -> bytes:
    """GET, or POST of a JSON body, past any proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
        return response.read()


def test_serves_over_http(tmp_path: Path, child_env: dict[str, str], prompts: list[Any]) -> None:
    """Asked for in lower case, with pages that the platform's own backend does not have."""
    options = ["--attention-backend", "fusedmla", "--block-size", "32", "--enforce-eager", "--max-model-len", "1024"]
    with serving(tmp_path, engine_env(child_env), *options, "--served-model-name", "demo") as (url, log):
        assert "FUSEDMLA: first decode" not in log.read_text(errors="replace")
        body = {"model": "demo", "prompt": [p.prompt for p in prompts], "max_tokens": 12, "temperature": 0}
        choices = json.loads(get(f"{url}/v1/completions", body))["choices"]
        printed = log.read_text(errors="replace")
    hops = [correct_hops(example, choice["text"]) for example, choice in zip(prompts, choices, strict=True)]
    assert sum(hops) / sum(len(example.answer_ids) for example in prompts) >= 0.95
    assert "FUSEDMLA: first decode" in printed and ", 32, 576] in bfloat16, PyTorch reference" in printed


def test_cpu_rotary_op_is_still_wrong() -> None:
    """Fails once vLLM is repaired: then `compat.disable_cpu_rotary_op` can go."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(64, 64, 128, 10000.0, is_neox_style=False, dtype=torch.float32)
    positions, query, key = torch.arange(5), torch.randn(5, 4, 64), torch.randn(5, 1, 64)
    native = rotary.forward_native(positions, query.clone(), key.clone())
    by_op = rotary.forward_cpu(positions, query.clone(), key.clone())
    assert (native[0] - by_op[0]).abs().max() > 0.1

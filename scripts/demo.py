# SPDX-License-Identifier: Apache-2.0
"""Serve the shipped model with `vllm serve --attention-backend FUSEDMLA` over HTTP and check its answers.

Each prompt lists the links of a shuffled cycle, drawn afresh, and asks for the walk from one node: an answer needs
exact attention over the whole prompt at every step (evals/tasks/chain_recall.py). Exit code 0 if every answer is right
and the server's log shows that FUSEDMLA computed them, else 1. Run it with `make demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from evals.tasks.chain_recall import Example, correct_hops, make_example  # noqa: E402

MODEL = Path("evals/models/demo")
LINKS = (16, 32, 48, 64)
"""Cycle lengths of the prompts, in turn."""
EVIDENCE = ("Using FUSEDMLA backend", "FUSEDMLA: dense MLA decode by", "FUSEDMLA: first decode")
"""What the server logs when it chose the backend, when it built its layers, and when it decoded with them."""


class DemoError(Exception):
    """The demo cannot go on; the message is for the user."""


def serve_command(port: int, kv_cache_dtype: str, on_gpu: bool) -> list[str]:
    """The server's command line."""
    script = Path(sys.executable).with_name("vllm")
    vllm = [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]  # the same thing
    command = [*vllm, "serve", str(MODEL), "--attention-backend", "FUSEDMLA"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-dtype", kv_cache_dtype]
    command += ["--max-model-len", "2048", "--max-num-seqs", "8"]
    # A GPU server runs as in production, with CUDA graphs. torch.compile on a CPU needs a C++ compiler and minutes.
    return [*command, "--gpu-memory-utilization", "0.3"] if on_gpu else [*command, "--enforce-eager"]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in a process group of its own, its output in `log`; the whole group ends with the block."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    env.pop("TRITON_INTERPRET", None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPO, env=env, start_new_session=True)
        try:
            yield process
        finally:
            process.terminate()  # the server ends its workers itself; what is left of the group is killed
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def call(url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> bytes:
    """GET `url`, or POST `body` to it as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # No proxy: the server is on this machine.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as response:
        return response.read()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, seconds: float) -> float:
    """Wait for the server, showing the time; returns the seconds it took."""
    begin, shown = time.monotonic(), 0.0
    while (passed := time.monotonic() - begin) < seconds:
        if process.poll() is not None:
            raise DemoError(f"the server ended with exit code {process.returncode} while starting")
        if sys.stdout.isatty() or passed >= shown:
            print(f"\r  starting  {passed:.0f} s ", end="" if sys.stdout.isatty() else "\n", flush=True)
            shown = passed + 10
        try:
            call(f"{url}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            print(f"\r  ready     after {passed:.0f} s")
            return passed
    raise DemoError(f"the server was not ready after {seconds:.0f} s")


def shorten(text: str, words: int = 22) -> str:
    """The text without its middle, for the terminal."""
    parts = text.split()
    return text if len(parts) <= words else " ".join([*parts[: words - 8], "...", *parts[-8:]])


def ask(url: str, example: Example, number: int) -> bool:
    """Send one prompt, print request and answer, and say whether the answer is right."""
    hops = len(example.answer.split())
    body = {"model": str(MODEL), "prompt": example.prompt, "max_tokens": hops, "temperature": 0}
    reply = json.loads(call(f"{url}/v1/completions", body))
    answer, tokens = reply["choices"][0]["text"].strip(), reply["usage"]["prompt_tokens"]
    count = correct_hops(example, answer)
    right = answer.split() == example.answer.split()
    shown = json.dumps({**body, "prompt": shorten(example.prompt)})
    print(f"\nrequest {number}: POST /v1/completions, {tokens} prompt tokens")
    print(textwrap.fill(shown, 110, initial_indent="  ", subsequent_indent="  "))
    print(textwrap.fill(answer or "(empty)", 110, initial_indent="  answer    ", subsequent_indent=" " * 12))
    if not right:
        print(textwrap.fill(example.answer, 110, initial_indent="  expected  ", subsequent_indent=" " * 12))
    print(f"  {'right' if right else 'WRONG'}     {count} of {hops} steps of the walk")
    return right


def evidence_in(log: Path) -> dict[str, str]:
    """The log's first line for each piece of evidence, empty where there is none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = text.splitlines()
    return {mark: next((line.strip() for line in lines if mark in line), "") for mark in EVIDENCE}


def run(args: argparse.Namespace) -> int:
    """The demo; returns the exit code."""
    if not (REPO / MODEL / "config.json").is_file():
        raise DemoError(f"{MODEL} is missing: the model is part of the repository, this checkout is incomplete")
    import torch  # late: it takes seconds

    on_gpu = torch.cuda.is_available()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    rng = random.Random(seed)
    port = free_port()
    url, command = f"http://127.0.0.1:{port}", serve_command(port, args.kv_cache_dtype, on_gpu)
    print(f"FUSEDMLA demo on {torch.cuda.get_device_name(0) if on_gpu else 'the CPU'}, prompts from seed {seed}")
    print(textwrap.fill(shlex.join(["vllm", *command[1:]]), 110, initial_indent="  $ ", subsequent_indent="    "))
    begin = time.monotonic()
    with server(command, args.log) as process:
        wait_until_healthy(process, url, args.timeout)
        examples = [make_example(rng, links := LINKS[i % len(LINKS)], links // 2) for i in range(args.prompts)]
        right = sum(ask(url, example, i + 1) for i, example in enumerate(examples))
        evidence = evidence_in(args.log)
    print("\nin the server's log:")
    for mark, line in evidence.items():
        print(textwrap.fill(line or f"MISSING: {mark}", 110, initial_indent="  ", subsequent_indent="    "))
    if not all(evidence.values()):
        raise DemoError(f"{right} of {args.prompts} answers right, but nothing shows that FUSEDMLA computed them")
    verdict = "PASS" if right == args.prompts else "FAIL"
    taken = time.monotonic() - begin
    print(f"\n{verdict}: {right} of {args.prompts} answers right, computed by FUSEDMLA, {taken:.0f} s in all")
    return 0 if right == args.prompts else 1


def main() -> int:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=len(LINKS), help=f"number of requests (default {len(LINKS)})")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as for vllm serve (default auto)")
    parser.add_argument("--seed", type=int, help="of the prompts (default: a fresh one)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server (default 600)")
    parser.add_argument("--log", type=Path, default=REPO / ".demo" / "server.log", help="the server's log")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts must be at least 1, got {args.prompts}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    args.log.unlink(missing_ok=True)  # never show an earlier run's
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\ninterrupted")
        return 130
    except (DemoError, OSError, KeyError, ValueError) as error:
        print(f"\nFAIL: {error}")
        if args.log.is_file():
            tail = args.log.read_text(errors="replace").splitlines()[-30:]
            print(f"\nthe end of {args.log}:", *(f"  | {line}" for line in tail), sep="\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

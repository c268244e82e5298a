# SPDX-License-Identifier: Apache-2.0
"""The verdict of `make demo`, with a stand-in for the server: tests/test_vllm_cpu.py serves with the real one."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Answers chain-recall prompts by following the links, in one of several moods, with a child process of its own.
STAND_IN = """
import http.server, json, subprocess, sys

port, mood, *evidence = int(sys.argv[1]), *sys.argv[2:]
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, *([] if mood == "silent" else evidence), sep="\\n", flush=True)
if mood == "dies":
    sys.exit(3)


class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(b"")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *links, query = request["prompt"].split(";")
        step = dict(link.split() for link in links)
        walk = [query.split()[1]]
        while len(walk) <= request["max_tokens"]:
            walk.append(step[walk[-1]])
        if mood == "wrong":
            walk[-1] = walk[0]
        usage = {"prompt_tokens": 1 + len(request["prompt"].split())}
        self.reply(json.dumps({"choices": [{"text": " ".join(walk[1:])}], "usage": usage}).encode())


http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def demo(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_script", repo / "scripts" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_demo(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run the demo against the stand-in in the given mood; returns exit code and output."""
    script, log = tmp_path / "stand_in.py", tmp_path / "logs" / "server.log"
    script.write_text(STAND_IN)

    def run(mood: str, *options: str) -> tuple[int, str]:
        def command(port: int, kv_cache_dtype: str, on_gpu: bool) -> list[str]:
            return [sys.executable, str(script), str(port), mood, *demo.EVIDENCE]

        monkeypatch.setattr(demo, "serve_command", command)
        monkeypatch.setattr(sys, "argv", ["demo.py", "--log", str(log), "--timeout", "30", *options])
        code = demo.main()
        child = int(log.read_text().splitlines()[1])
        end = time.monotonic() + 5
        while running(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not running(child), "the server's own children must end with it"
        return code, capsys.readouterr().out

    return run


def test_right_answers(run_demo: Callable[..., tuple[int, str]], seed: int) -> None:
    code, output = run_demo("right", "--prompts", "3", "--seed", str(seed))
    assert code == 0
    assert f"prompts from seed {seed}" in output
    assert output.count("  right     ") == 3 and "WRONG" not in output
    assert "PASS: 3 of 3 answers right, computed by FUSEDMLA" in output


def test_fresh_prompts_each_time(run_demo: Callable[..., tuple[int, str]]) -> None:
    first, second = (run_demo("right", "--prompts", "1")[1] for _ in range(2))
    prompts = [next(line for line in output.splitlines() if '"prompt"' in line) for output in (first, second)]
    assert prompts[0] != prompts[1]


def test_wrong_answer(run_demo: Callable[..., tuple[int, str]]) -> None:
    code, output = run_demo("wrong", "--prompts", "2")
    assert code == 1
    assert "WRONG     7 of 8 steps of the walk" in output and "  expected  " in output
    assert "FAIL: 0 of 2 answers right" in output


def test_right_answers_without_evidence(run_demo: Callable[..., tuple[int, str]], demo: ModuleType) -> None:
    code, output = run_demo("silent", "--prompts", "1")
    assert code == 1
    assert all(f"MISSING: {mark}" in output for mark in demo.EVIDENCE)
    assert "FAIL: 1 of 1 answers right, but nothing shows that FUSEDMLA computed them" in output


def test_server_that_ends(run_demo: Callable[..., tuple[int, str]]) -> None:
    code, output = run_demo("dies")
    assert code == 1
    assert "FAIL: the server ended with exit code 3 while starting" in output
    assert "  | child" in output, "the log's end is shown"


def test_missing_model(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", Path("evals/models/absent"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--log", str(tmp_path / "server.log")])
    assert demo.main() == 1
    assert "FAIL: evals/models/absent is missing" in capsys.readouterr().out


def test_command_serves_with_fusedmla(demo: ModuleType) -> None:
    command = demo.serve_command(8123, "fp8", on_gpu=False)
    assert command[1:5] == ["serve", "evals/models/demo", "--attention-backend", "FUSEDMLA"]
    assert command[command.index("--kv-cache-dtype") + 1] == "fp8" and command[command.index("--port") + 1] == "8123"
    assert "--enforce-eager" not in demo.serve_command(8123, "auto", on_gpu=True)

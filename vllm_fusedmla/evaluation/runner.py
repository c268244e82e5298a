# SPDX-License-Identifier: Apache-2.0
"""Runs the engines of a comparison one after the other and keeps what they saved."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import workarounds
from .configurations import ENVIRONMENT, Run, fingerprint, task_file

WORKER = (sys.executable, "-m", "vllm_fusedmla.evaluation.worker")
_POLL_SECONDS = 0.5


def folder_of(run: Run, out: Path) -> Path:
    """Where a run's results, request and log are."""
    return out / "runs" / run.name


def state(run: Run, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """What is saved of a run: ``{"status", "seconds", "error", "tasks" or "teacher"}``.

    "ok" where nothing is left to do, "error" where the last attempt failed, "unfinished" else.
    """
    folder = folder_of(run, out)
    found: dict[str, Any] = {"status": "unfinished"}
    if not _is_of(run, settings, folder):
        return found
    for name in ("error", "about"):
        found |= _saved(folder / f"{name}.json") or {}
    if run.teacher:
        teacher = _saved(folder / "teacher.json")
        if teacher is not None:
            found["teacher"] = teacher
    else:
        results = {task: _saved(folder / task_file(task)) for task in settings["tasks"]}
        found["tasks"] = {task: result for task, result in results.items() if result is not None}
    whole = "teacher" in found if run.teacher else len(found["tasks"]) == len(settings["tasks"])
    if whole:
        found.pop("error", None)
    return found | {"status": "ok" if whole else "error" if "error" in found else "unfinished"}


def _is_of(run: Run, settings: dict[str, Any], folder: Path) -> bool:
    """Whether what a folder holds is of this run with these settings."""
    request = _saved(folder / "request.json")
    return request is not None and request["fingerprint"] == fingerprint(run, settings)


def _saved(path: Path) -> Any:
    """What a file holds, None where there is none: another thread may just be starting the run anew."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def device_slots(parallel: int, settings: dict[str, Any]) -> queue.Queue[str]:
    """For each engine that may run at a time, CUDA_VISIBLE_DEVICES of its process: the GPUs in turn, or several each.

    Empty where an engine sees all there are.
    """
    slots: queue.Queue[str] = queue.Queue()
    groups = [""]
    if parallel > 1:
        import torch

        sizes = [f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data")]
        options = [settings["model_args"] | variant for variant in ({}, *settings["variants"].values())]
        size = max(math.prod(int(given.get(name, 1)) for name in sizes) for given in options)
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        groups = [",".join(names[i : i + size]) for i in range(0, len(names) - size + 1, size)] or [""]
    for number in range(max(parallel, 1)):
        slots.put(groups[number % len(groups)])
    return slots


def execute(
    run: Run, settings: dict[str, Any], out: Path, timeout: float, show: bool = True, devices: str = ""
) -> dict[str, Any]:
    """Run what is left of `run`; its state afterwards. `show`: the last progress bar of its log, on a terminal.

    `devices`: CUDA_VISIBLE_DEVICES of its process, if not empty.
    """
    folder, key = folder_of(run, out), fingerprint(run, settings)
    request = folder / "request.json"
    if not _is_of(run, settings, folder):
        shutil.rmtree(folder, ignore_errors=True)  # other settings: nothing of it can be used
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.json").unlink(missing_ok=True)
    _save(request, {"run": dataclasses.asdict(run), "settings": settings, "fingerprint": key})
    begin, log = time.monotonic(), folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*WORKER, str(request), str(folder)],
            env=environment(run, folder, settings, devices),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(process, log if show and sys.stderr.isatty() else None, begin + timeout)
        finally:
            _end_group(process)
    seconds = round(time.monotonic() - begin, 1)
    _save(folder / "about.json", {"seconds": seconds})
    if code != 0 and not (folder / "error.json").exists():
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:] or ["no output"]
        reason = f"timed out after {timeout:.0f} s" if code is None else f"exit code {code}: {last[0][:300]}"
        _save(folder / "error.json", {"error": reason})
    return state(run, settings, out)


def _save(path: Path, value: dict[str, Any]) -> None:
    """All at once: other runs' threads look at what is saved meanwhile."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def environment(run: Run, folder: Path, settings: dict[str, Any], devices: str = "") -> dict[str, str]:
    """Environment of a run's process: it counts decoded tokens in its folder, and imports what this process can."""
    env = dict(os.environ) | settings["variants"].get(run.variant, {}).get(ENVIRONMENT, {})
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = devices
    # Spawned workers too: a plugin or task from the source tree is found as it is here.
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    env["FUSEDMLA_COUNT_DIR"] = str((folder / "counts").resolve())
    env["FUSEDMLA_EVAL_FAULT"] = run.fault
    env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    return env | workarounds.teacher_environment() if run.teacher else env


def _wait(process: subprocess.Popen[bytes], log: Path | None, deadline: float) -> int | None:
    """Exit code, None if it ran past the deadline. Shows the last progress bar of the log meanwhile, if given."""
    shown, code = "", None
    while code is None and time.monotonic() < deadline:
        try:
            code = process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            shown = _show_progress(log, shown) if log else ""
    if shown:
        print("\r" + " " * 114 + "\r", end="", file=sys.stderr, flush=True)
    return code


def _show_progress(log: Path, shown: str) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        tail = file.read().decode(errors="replace")
    bars = re.findall(r"[^\r\n]*?\d+%\|[^\r\n]*|fusedmla eval: task \S+", tail)
    line = re.sub(r"\|[^|]*\|", "", bars[-1]).strip()[:110] if bars else ""
    if line and line != shown:
        print(f"\r  {line:<112}", end="", file=sys.stderr, flush=True)
    return line or shown


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever a run has left; its session holds nothing else."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()

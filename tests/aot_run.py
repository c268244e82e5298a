# SPDX-License-Identifier: Apache-2.0
"""Runs aot.py and aot_indexer.py, several processes at a time: a compilation keeps one CPU busy."""

import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent


def compile_cases(program: str, cases: list[dict], env: dict[str, str], alt: pathlib.Path | None) -> list[dict]:
    """The reports of a program's cases, in their order, with this environment's Triton or the one unpacked in `alt`."""
    path = [str(HERE.parent)] + ([str(alt)] if alt else [])
    env = env | {"PYTHONPATH": os.pathsep.join(path + [env.get("PYTHONPATH", "")])}
    processes = max(1, min(os.cpu_count() or 1, 4, len(cases)))

    def run(first: int) -> list[dict]:
        text = json.dumps(cases[first::processes])
        done = subprocess.run([sys.executable, HERE / program], input=text, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    reports: list[dict] = [{} for _ in cases]
    with ThreadPoolExecutor(processes) as pool:
        for first, part in enumerate(pool.map(run, range(processes))):
            reports[first::processes] = part
    return reports

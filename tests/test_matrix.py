# SPDX-License-Identifier: Apache-2.0
"""evals/matrix.sh: its commands are ones that the programs take, and between them they run every backend and fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

from evals import faults
from vllm_fusedmla.__main__ import build_parser
from vllm_fusedmla.evaluation import cli

ROOT = Path(__file__).resolve().parent.parent
RECORDER = f"""#!{sys.executable}
import fcntl, json, os, sys
with open(os.environ["RECORD"], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps([os.environ.get("VLLM_FUSEDMLA_INDEXER", ""), *sys.argv[1:]]) + "\\n")
"""


def test_every_command_is_understood(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(RECORDER)
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    script = ["bash", f"{ROOT}/evals/matrix.sh", f"{tmp_path}/out", f"{tmp_path}/models"]
    said = subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout
    commands = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    prepared = {command[2] for command in commands if command[2] != "vllm_fusedmla"}
    assert prepared == {"evals.models.widen", "evals.models.outliers"}

    names, backends, injected = set(), set(), set()
    for indexer, *command in commands:
        if command[1] != "vllm_fusedmla":
            continue
        args = build_parser().parse_args(command[2:])
        plan = cli.plan_of(args, cli.settings_of(args))
        names.add(args.out.name)
        backends |= {(run.backend, run.kv_cache_dtype) for run in plan.configurations}
        injected |= {run.fault for run in plan.configurations if run.fault}
        assert (indexer == "1") == (args.out.name == "tasks-dsa-indexer")
    assert said.count("exit code 0") == len(names) == 8
    dense, sparse = ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA"), ("FLASHMLA_SPARSE", "FLASH_ATTN_MLA_SPARSE")
    assert backends == {
        *((name, dtype) for name in ("FUSEDMLA", *dense) for dtype in ("auto", "fp8")),
        *((name, dtype) for name in ("FUSEDMLA", *sparse) for dtype in ("auto", "fp8_ds_mla")),
    }
    assert injected == set(faults.FAULTS)

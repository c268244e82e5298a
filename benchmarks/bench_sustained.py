# SPDX-License-Identifier: Apache-2.0
"""Times kernels that run back to back for seconds, as under a server's full load, with the power and clock they get.

    python benchmarks/bench_sustained.py --case 'b128 h128 kv8192' --dtypes bf16,fp8 --providers fusedmla,flashmla,fa3
    python benchmarks/bench_sustained.py --case 'prefill s4096 h128 topk2048 kv32768' --json sustained.json

A GPU at its power limit lowers its clock, which bench_decode.py's single calls, each behind an overwritten L2, show but
in part. Here the caches stay as a call leaves them. Results are not checked: bench_decode.py does that.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import providers, report
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, Pool
from benchmarks.timing import environment, one_line

CALLS = 10
"""Launched together; then the host waits."""
_REST_SECONDS = 0.3
_QUERY = "clocks.sm,power.draw.instant,clocks_event_reasons.active"
_POWER_LIMIT = 0x4
_SETTLED = 0.25
"""Share of the samples at the beginning, and the end, that are left out."""


class Sensors:
    """Clock, power and what limits the clock, sampled by nvidia-smi while the block runs; nothing without it."""

    def __init__(self, device: torch.device):
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", "-lms", "100"]
        self._command = [*command, "-i", str(device.index or 0)]
        self.lines: list[str] = []

    def __enter__(self) -> "Sensors":
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._process = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self.lines = self._process.communicate()[0].splitlines()


def summary(lines: list[str]) -> dict[str, Any]:
    """Medians of nvidia-smi's lines, those at both ends left out, and whether power limited the clock in most."""
    samples = [line.split(", ") for line in lines if line.count(",") == 2]
    cut = int(len(samples) * _SETTLED)
    settled = samples[cut : len(samples) - cut]
    try:
        clocks, watts = ([float(sample[i]) for sample in settled] for i in range(2))
        limited = [int(sample[2], 16) & _POWER_LIMIT > 0 for sample in settled]
    except ValueError:  # a sensor that this GPU has not
        return {}
    if not settled:
        return {}
    return {
        "sm_mhz": statistics.median(clocks),
        "watts": round(statistics.median(watts), 1),
        "power_limited": sum(limited) * 2 > len(limited),
    }


def run(x: Inputs, name: str, seconds: float) -> report.Row:
    """Call a provider for `seconds`. Never raises: what went wrong is in the row."""
    row: report.Row = {"case": x.case.name, "provider": name, "dtype": x.dtype}
    kind, known = ("dense", providers.ALL) if x.case.topk is None else ("sparse", providers.SPARSE)
    if name not in known:
        return row | {"note": f"no {kind} attention"}
    try:
        provider = known[name]()
        row["version"] = provider.load()
        if x.dtype not in provider.dtypes:
            raise providers.Unsupported(f"no {x.dtype} cache")
        call = provider.prepare(x).call
        wait = torch.cuda.synchronize if x.q.is_cuda else lambda: None
        call()
        wait()
        time.sleep(_REST_SECONDS)
        count = 0
        with Sensors(x.q.device) as sensors:
            begin = time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < seconds:
                for _ in range(CALLS):
                    call()
                wait()
                count += CALLS
        return row | {"mean_us": elapsed / count * 1e6, "calls": count} | summary(sensors.lines)
    except Exception as error:
        expected = isinstance(error, providers.Unavailable | providers.Unsupported)
        return row | {"note": str(error) if expected else one_line(error)}


def table(rows: list[report.Row]) -> str:
    header = ["case", "cache", "kernel", "us", "SM clock, MHz", "W", "limited by power"]
    lines = []
    for row in rows:
        limited = {True: "yes", False: "no", None: ""}[row.get("power_limited")]
        times = [f"{row['mean_us']:.1f}" if "mean_us" in row else row["note"]]
        sensors = [f"{row[name]:.0f}" if name in row else "" for name in ("sm_mhz", "watts")]
        lines.append([row["case"], row["dtype"], row["provider"], *times, *sensors, limited])
    return report.markdown(header, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="as of bench_decode.py (default: b128 h128 kv8192)"
    )
    parser.add_argument("--providers", default="fusedmla,flashmla,fa3", help="as of bench_decode.py")
    parser.add_argument("--dtypes", default="bf16", help="dtypes of the cache: bf16, fp8, fp8_ds_mla")
    parser.add_argument("--seconds", type=float, default=1.2, help="of each kernel, in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="save the rows here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cases = [Case.parse(name) for name in args.case or ["b128 h128 kv8192"]]
    pool, rows = Pool.for_cases(cases, device), []
    for dtype in args.dtypes.split(","):
        for case in cases:
            x = pool.inputs(case, dtype)
            for _ in range(args.rounds):
                rows += [run(x, name, args.seconds) for name in args.providers.split(",")]
    print(table(rows))
    if args.json:
        report.write_json(args.json, {"format": 1, "environment": environment(device), "rows": rows})


if __name__ == "__main__":
    main()

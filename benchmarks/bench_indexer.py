# SPDX-License-Identifier: Apache-2.0
"""Times the kernels of DeepSeek Sparse Attention's indexer, this project's and others', and checks each result.

    python benchmarks/bench_indexer.py --json indexer.json
    python benchmarks/bench_indexer.py --case 'paged b8 kv65536' --providers fusedmla,deepgemm

The scores are those of 64 heads. Exit code 1 if a result is wrong, one of this project's rows ends in an error, or
`--compare` finds a regression. A provider that is not installed is a note.
"""

import argparse
import datetime
import json
import pathlib
import re
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import indexer_cases, providers, report
from benchmarks.indexer_cases import CASES, IndexerCase, IndexerInputs
from benchmarks.providers import indexer
from benchmarks.timing import Timer, capture, environment, one_line

DTYPE = "indexer"
"""What stands for the cache's dtype in the rows."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--case", action="append", metavar="NAME", help="a case by name, e.g. 'topk64 b3 kv777'")
    parser.add_argument(
        "--providers",
        default=",".join(indexer.DEFAULT),
        help=f"comma-separated: {', '.join(indexer.ALL)} (default: %(default)s)",
    )
    parser.add_argument("--reps", type=int, default=25, help="timed repetitions of each call")
    parser.add_argument(
        "--flush", choices=["write", "read"], default="write", help="how L2 is emptied before each call"
    )
    parser.add_argument("--no-graph", action="store_true", help="time plain launches, not replays of a CUDA graph")
    parser.add_argument("--json", type=pathlib.Path, help="save the run here")
    parser.add_argument("--compare", type=pathlib.Path, metavar="OLD.json", help="exit 1 on rows slower by over 5 %%")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.providers = args.providers.split(",")
    for name in args.providers:
        if name not in indexer.ALL:
            parser.error(f"--providers: unknown {name!r}, choose from {', '.join(indexer.ALL)}")
    return args


def load(name: str, device: torch.device) -> tuple[indexer.IndexerProvider, str] | str:
    """A loaded provider and its version, or why there is none."""
    provider = indexer.ALL[name]()
    try:
        if device.type != "cuda" and not provider.runs_on_cpu():
            raise providers.Unavailable("needs a CUDA device")
        return provider, provider.load()
    except Exception as error:
        return str(error) if isinstance(error, providers.Unavailable) else one_line(error)


def measure(
    x: IndexerInputs, found: tuple[indexer.IndexerProvider, str] | str, timer: Timer, ceilings: dict, graph: bool
) -> report.Row:
    """What to add to a row about one provider on one case. Never raises: what went wrong is in the row."""
    if isinstance(found, str):
        return {"status": "absent", "note": found}
    provider, version = found
    row: report.Row = {"version": version}
    if x.case.kind not in provider.kinds:
        return row | {"status": "unsupported", "note": ""}
    try:
        captured = capture(provider.prepare(x), timer.device, graph)
        timing = timer.measure(captured)
        figures = report.figures(x.case, DTYPE, timing.median_us, ceilings)
        row |= {"median_us": timing.median_us, "p20_us": timing.p20_us, "p80_us": timing.p80_us, "reps": timing.reps}
        row |= {"method": timing.method, "sm_mhz": timing.sm_mhz, **figures}
        excess, wrong = indexer_cases.check(x, captured.result, provider.slack)
        return row | {
            "error_over_tolerance": excess,
            "status": "FAIL" if wrong else "ok",
            "note": wrong or captured.note,
        }
    except providers.Unsupported as error:
        return row | {"status": "unsupported", "note": str(error)}
    except Exception as error:
        return row | {"status": "error", "note": one_line(error)}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    cases = [case for case in CASES if args.cases is None or re.search(args.cases, case.name)]
    cases = (cases if args.cases or not args.case else []) + [IndexerCase.parse(name) for name in args.case or []]
    timer = Timer(device, args.reps, args.flush)
    loaded = {name: load(name, device) for name in args.providers}
    words = ["--providers", ",".join(args.providers), "--reps", str(args.reps), "--flush", args.flush]
    run: report.Row = {
        "format": 1,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/bench_indexer.py", *words]),
        "ceilings": timer.ceilings(),
        "rows": [],
    }
    rows = run["rows"]
    for case in cases:
        x = indexer_cases.make_inputs(case, device)
        for name in args.providers:
            row = {"case": case.name, "provider": name, "dtype": DTYPE, "status": "error", "note": ""}
            row |= environment(device) | {"flush": args.flush}
            row |= measure(x, loaded[name], timer, run["ceilings"], not args.no_graph)
            rows.append(row)
            median = f"{row['median_us']:9.1f} us {row['method']}" if "median_us" in row else ""
            print(f"{case.name:<24} {name:<17} {median} {row['status']} {row['note']}", flush=True)
            if args.json:
                report.write_json(args.json, run)
    print("\n" + report.table(rows, DTYPE))
    print(f"\nceilings: {json.dumps({k: round(v, 1) for k, v in run['ceilings'].items()})}")
    for line in report.notes(rows):
        print(line)
    bad = any(row["status"] == "FAIL" for row in rows)
    bad |= any(row["status"] == "error" and row["provider"].startswith(report.OURS) for row in rows)
    if args.compare:
        text, worse = report.compare(rows, json.loads(args.compare.read_text())["rows"])
        print("\n" + text)
        bad |= worse
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Times MLA attention kernels, this project's and others', over a grid of launch shapes, and checks each result.

    python benchmarks/bench_decode.py --grid quick
    python benchmarks/bench_decode.py --grid sparse --dtypes fp8_ds_mla,bf16 --json sparse.json
    python benchmarks/bench_decode.py --grid peers --dtypes bf16,fp8 --json run.json --csv run.csv
    python benchmarks/bench_decode.py --grid full --cases 'h16' --providers fusedmla,fa3 --compare old.json

Exit code 1 if a result is wrong, one of this project's rows ends in an error, or `--compare` finds a regression. A
provider that is not installed is a note. With `--json` every row is saved as soon as it is measured, and a device error
that no later launch would survive restarts the program where it stopped.
"""

import argparse
import datetime
import faulthandler
import json
import os
import pathlib
import sys
import time
import traceback

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import check, providers, report
from benchmarks.cases import CACHE_ROW_BYTES, GRIDS, select
from benchmarks.inputs import Inputs, Pool
from benchmarks.timing import Timer, capture, environment, one_line

RESTARTS = 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="quick")
    parser.add_argument("--cases", metavar="REGEX", help="only cases of the grid whose name matches")
    parser.add_argument(
        "--case",
        action="append",
        metavar="NAME",
        help="a case by name, e.g. 'b7 s_q2 h12 kv777 page32', 'b7 h12 topk64 kv777', 'prefill s9 h12 topk64 kv777'",
    )
    known = list(dict.fromkeys([*providers.ALL, *providers.SPARSE]))
    parser.add_argument(
        "--providers",
        help=f"comma-separated, or 'all': {', '.join(known)} (default: {','.join(providers.DEFAULT)}; "
        f"for the grid sparse {','.join(providers.DEFAULT_SPARSE)})",
    )
    parser.add_argument(
        "--dtypes",
        default="bf16",
        help="comma-separated dtypes of the cache: bf16, fp8 (one scale), fp8_ds_mla (656 bytes a token)",
    )
    parser.add_argument("--reps", type=int, default=25, help="timed repetitions of each call")
    parser.add_argument(
        "--flush", choices=["write", "read"], default="write", help="how L2 is emptied before each call"
    )
    parser.add_argument("--no-graph", action="store_true", help="time plain launches, not replays of a CUDA graph")
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--json", type=pathlib.Path, help="save the run here")
    parser.add_argument("--csv", type=pathlib.Path, help="save the rows here")
    parser.add_argument("--compare", type=pathlib.Path, metavar="OLD.json", help="exit 1 on rows slower by over 5 %%")
    parser.add_argument("--resume", action="store_true", help="keep what the --json file already holds and go on")
    parser.add_argument("--row-timeout", type=float, default=180.0, help="seconds after which a stuck row ends the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.providers is None:
        args.providers = list(providers.DEFAULT_SPARSE if args.grid == "sparse" else providers.DEFAULT)
    else:
        args.providers = known if args.providers == "all" else args.providers.split(",")
    args.dtypes = args.dtypes.split(",")
    for name in args.providers:
        if name not in known:
            parser.error(f"--providers: unknown {name!r}, choose from {', '.join(known)}")
    for dtype in args.dtypes:
        if dtype not in CACHE_ROW_BYTES:
            parser.error(f"--dtypes: unknown {dtype!r}, choose from {', '.join(CACHE_ROW_BYTES)}")
    if args.resume and not args.json:
        parser.error("--resume needs --json")
    return args


class Bench:
    """One run: loads providers, measures rows, keeps the JSON file current."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.cases = select(args.grid, args.cases, args.case)
        self.environment = environment(self.device)
        self.run: report.Row = {
            "format": 1,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "python " + " ".join(["benchmarks/bench_decode.py", *_without_paths(args)]),
            "restarts": 0,
            "rows": [],
        }
        if args.resume and args.json.exists():
            self.run = json.loads(args.json.read_text())
            self._close_unfinished_row()
        self.loaded: dict[tuple[str, bool], tuple[providers.Provider, str] | str] = {}
        self.timer = Timer(self.device, args.reps, args.flush)

    @property
    def rows(self) -> list[report.Row]:
        return self.run["rows"]

    def save(self) -> None:
        if self.args.json:
            report.write_json(self.args.json, self.run)

    def _close_unfinished_row(self) -> None:
        """A row that was being measured when the program ended must not be tried again."""
        if running := self.run.pop("running", None):
            note = "the program ended in this row"
            self.rows.append({**running, **self.environment, "status": "error", "note": note})

    def main(self) -> int:
        begin = time.monotonic()
        if "ceilings" not in self.run:
            self.run["ceilings"] = self.timer.ceilings()
        for name, value in self.run["ceilings"].items():
            say(f"{name}: {value:.1f}")
        pool = Pool.for_cases(self.cases, self.device)
        done = {report.key(row) for row in self.rows}
        total, count = len(self.cases) * len(self.args.dtypes) * len(self.args.providers), 0
        for dtype in self.args.dtypes:
            for case in self.cases:
                todo = [name for name in self.args.providers if (case.name, name, dtype) not in done]
                x = pool.inputs(case, dtype) if todo else None
                references: dict[str, check.Expected] = {}
                for name in self.args.providers:
                    count += 1
                    if name not in todo:
                        continue
                    assert x is not None
                    # Not sys.stderr, which a test runner may have replaced by something without a descriptor.
                    faulthandler.dump_traceback_later(self.args.row_timeout, exit=True, file=sys.__stderr__ or 2)
                    self.run["running"] = {"case": case.name, "provider": name, "dtype": dtype}
                    self.save()
                    row = self.row(x, name, references)
                    self.rows.append(row)
                    self.run.pop("running")
                    self.save()
                    faulthandler.cancel_dump_traceback_later()
                    say(f"[{count}/{total} {time.monotonic() - begin:4.0f} s] {progress(row)}")
                    if row["status"] == "error" and not self.device_alive():
                        self.restart()
        self.run["seconds"] = round(self.run.get("seconds", 0) + time.monotonic() - begin, 1)
        self.save()
        if self.args.csv:
            report.write_csv(self.args.csv, self.rows)
        return self.finish()

    def provider(self, name: str, sparse: bool) -> tuple[providers.Provider, str] | str:
        """The loaded provider and its version, or why there is none. Loaded on first use."""
        key = name, sparse
        if key not in self.loaded:
            provider = (providers.SPARSE if sparse else providers.ALL)[name]()
            try:
                if self.device.type != "cuda" and not provider.runs_on_cpu():
                    raise providers.Unavailable("needs a CUDA device")
                self.loaded[key] = provider, provider.load()
            except Exception as error:
                self.loaded[key] = str(error) if isinstance(error, providers.Unavailable) else one_line(error)
                if name in providers.FALLBACKS:
                    stand_in = self.provider(providers.FALLBACKS[name], sparse)
                    if not isinstance(stand_in, str):
                        self.loaded[key] = stand_in
        return self.loaded[key]

    def row(self, x: Inputs, name: str, references: dict[str, check.Expected]) -> report.Row:
        """Measure one provider on one case. Never raises: what went wrong is in the row."""
        row: report.Row = {"case": x.case.name, "provider": name, "dtype": x.dtype, "status": "error", "note": ""}
        row |= self.environment
        sparse = x.case.topk is not None
        if name not in (providers.SPARSE if sparse else providers.ALL):
            return row | {"status": "unsupported", "note": f"no {'sparse' if sparse else 'dense'} attention"}
        found = self.provider(name, sparse)
        if isinstance(found, str):
            return row | {"status": "absent", "note": found}
        provider, row["version"] = found
        if x.dtype not in provider.dtypes:
            return row | {"status": "unsupported", "note": f"no {x.dtype} cache"}
        try:
            prepared = provider.prepare(x)
            captured = capture(prepared.call, self.device, not self.args.no_graph)
            timing = self.timer.measure(captured)
            row |= {
                "median_us": timing.median_us,
                "p20_us": timing.p20_us,
                "p80_us": timing.p80_us,
                "reps": timing.reps,
                "method": timing.method,
                "flush": self.args.flush,
                "sm_mhz": timing.sm_mhz,
                "schedule": prepared.schedule,
                "config": prepared.config,
                "note": captured.note,
                **report.figures(x.case, x.dtype, timing.median_us, self.run["ceilings"]),
            }
            row["status"] = "ok"
            if not self.args.no_check:
                # The oracle's own tensors are large: it runs after the timing, once per query it is asked about.
                which = "plain" if prepared.q is None else f"{name} query"
                if which not in references:
                    references[which] = check.expected(x, prepared.q)
                tolerance = check.tolerance(x, provider.strict)
                verdict = check.judge(*prepared.unpack(captured.result), references[which], tolerance)
                row |= {
                    "status": "ok" if verdict.ok else "FAIL",
                    "max_abs_error": verdict.max_abs_error,
                    "cosine_difference": verdict.cosine_difference,
                    "max_lse_error": verdict.max_lse_error,
                    "tolerance": "strict" if provider.strict else "peer",
                    "checked_requests": len(references[which].requests),
                }
                if not verdict.ok:
                    row["note"] = verdict.reason
        except providers.Unsupported as error:
            return row | {"status": "unsupported", "note": str(error)}
        except Exception as error:
            if provider.strict:
                traceback.print_exc()
            return row | {"status": "error", "note": one_line(error)}
        return row

    def device_alive(self) -> bool:
        """Whether the device still works after an error; an illegal access leaves the process without it."""
        try:
            torch.zeros(1, device=self.device).add_(1).item()
            return True
        except Exception:
            return False

    def restart(self) -> None:
        """Begin again in a new process with the rows measured so far."""
        if not self.args.json or self.run["restarts"] >= RESTARTS:
            say("the device does not work any more after this error; stopping")
            sys.exit(self.finish() or 1)
        say("the device does not work any more after this error; starting again where it happened")
        self.run["restarts"] += 1
        self.save()
        arguments = [argument for argument in sys.argv if argument != "--resume"]
        os.execv(sys.executable, [sys.executable, *arguments, "--resume"])

    def finish(self) -> int:
        """Print tables and notes; the exit code."""
        for dtype in self.args.dtypes:
            say("\n" + report.table(self.rows, dtype))
        say(f"\nceilings: {json.dumps({k: round(v, 1) for k, v in self.run['ceilings'].items()})}")
        say(f"{json.dumps(self.environment)}; bytes: each key once, bf16 query and output; {self.run.get('seconds')} s")
        for line in report.notes(self.rows):
            say(line)
        failed = any(row["status"] == "FAIL" for row in self.rows)
        broken = any(row["status"] == "error" and row["provider"].startswith(report.OURS) for row in self.rows)
        worse = False
        if self.args.compare:
            text, worse = report.compare(self.rows, json.loads(self.args.compare.read_text())["rows"])
            say("\n" + text)
        return 1 if failed or broken or worse else 0


def progress(row: report.Row) -> str:
    """One row as a line."""
    head = f"{row['case']:<27} {row['provider']:<20} {row['dtype']:<10} "
    if "median_us" not in row:
        return f"{head} {row['status']}: {row['note']}"
    error = f" err {row['max_abs_error']:.1e} cos {row['cosine_difference']:.0e}" if "max_abs_error" in row else ""
    return (
        f"{head} {row['median_us']:8.1f} us ({row['p20_us']:.1f}-{row['p80_us']:.1f}) {row['gbs']:5.0f} GB/s "
        f"{row['tflops']:4.0f} TF/s {row['method']}{error} {row['status']} {row['note']}"
    )


def say(text: str) -> None:
    print(text, flush=True)


def _without_paths(args: argparse.Namespace) -> list[str]:
    """The arguments that say what was measured, without where it was saved."""
    words = ["--grid", args.grid, "--providers", ",".join(args.providers), "--dtypes", ",".join(args.dtypes)]
    words += ["--cases", f"'{args.cases}'"] if args.cases else []
    words += [word for name in args.case or [] for word in ("--case", f"'{name}'")]
    words += ["--reps", str(args.reps), "--flush", args.flush]
    return words + (["--no-graph"] if args.no_graph else []) + (["--no-check"] if args.no_check else [])


if __name__ == "__main__":
    sys.exit(Bench(parse()).main())

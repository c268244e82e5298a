# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of saved benchmark runs: every case beside its floor, the peers and this project's targets.

    python benchmarks/tables.py RUN.json RUN2.json --chain latency_floor.json > tables.md

Rows that failed their check count as not measured. The fastest of a case is bold. With --chain, what latency_floor.py
measured, dense targets are named that ask for less time than that chain takes with the case's keys.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import report, targets
from benchmarks.cases import Case
from benchmarks.chain import Chain

ALLOWED = 1.05
"""How much slower than the best peer, or than the portable kernel, a case may be."""
PORTABLE = "fusedmla-portable"


def floor_us(case: Case, dtype: str, ceilings: dict[str, float]) -> float | None:
    """The larger of bytes over the read rate and operations over the bf16 matrix rate, as measured in the run."""
    if not ceilings.get("read_gbs") or not ceilings.get("matmul_tflops"):
        return None
    return max(case.min_bytes(dtype) / ceilings["read_gbs"] / 1e3, case.flops() / ceilings["matmul_tflops"] / 1e6)


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


class Table:
    """What one run measured with one dtype of the cache."""

    def __init__(self, run: report.Row, dtype: str) -> None:
        self.dtype = dtype
        self.ceilings: dict[str, float] = run.get("ceilings") or {}
        self.rows = [row for row in run["rows"] if row["dtype"] == dtype and row["status"] == "ok"]
        self.median = {(row["case"], row["provider"]): row["median_us"] for row in self.rows}
        ours = [row["case"] for row in self.rows if row["provider"] == report.OURS]
        self.cases = list(dict.fromkeys(ours))
        found = dict.fromkeys(row["provider"] for row in self.rows if row["case"] in self.cases)
        self.providers = sorted(found, key=lambda name: not name.startswith(report.OURS))

    def ratio(self, case: str) -> float | None:
        """The best peer's time over ours."""
        best = report.best_peer(self.rows, case)
        return best / self.median[case, report.OURS] if best else None

    def line(self, case: str, with_target: bool) -> list[str]:
        own = [name for name in self.providers if name.startswith(f"{report.OURS}-")]
        fastest = min(us for (name, provider), us in self.median.items() if name == case and provider not in own)
        cells = [case, number(floor_us(Case.parse(case), self.dtype, self.ceilings))]
        for provider in self.providers:
            us = self.median.get((case, provider))
            cells.append(f"**{number(us)}**" if us == fastest and provider not in own else number(us))
        ratio = self.ratio(case)
        cells.append("-" if ratio is None else f"{ratio:.2f}")
        if with_target:
            target = targets.RATIOS[case, self.dtype]
            short = "-" if ratio is None else f"no, {100 * (1 - ratio / target):.0f} % short"
            cells += [f"{target:g}", "yes" if ratio is not None and round(ratio, 2) >= target else short]
        return cells

    def below_chain(self, chain: Chain) -> str:
        """Targets of dense cases that ask for less than a decode without arithmetic takes, see `Chain.us`."""
        lines, count, lower = [], 0, 0
        for name in self.cases:
            case, ratio, rate = Case.parse(name), self.ratio(name), self.ceilings.get("matmul_tflops")
            if case.topk is not None or (name, self.dtype) not in targets.RATIOS or ratio is None or not rate:
                continue
            count += 1
            with_exchange, without = (chain.us(case, self.dtype, rate, exchange) for exchange in (True, False))
            ours = self.median[name, report.OURS]
            asked = ours * ratio / targets.RATIOS[name, self.dtype]
            if asked < with_exchange:
                lower += asked < without
                lines.append([name, *map(number, (asked, with_exchange, without, ours))])
        if not lines:
            return ""
        title = "Targets that ask for less than latency_floor.py's chain takes with the case's keys: "
        title += f"{len(lines)} of {count}; without its exchange through global memory: {lower}."
        header = ["case", "asked for", "chain", "without exchange", "fusedmla"]
        return f"{title}\n\n" + report.markdown(header, lines)

    def text(self) -> str:
        """Cases with targets, absolute targets, the other cases, and how many keep to what was asked for."""
        header = ["case", "floor", *self.providers, "best peer / fusedmla"]
        aimed = [case for case in self.cases if (case, self.dtype) in targets.RATIOS]
        others = [case for case in self.cases if case not in aimed]
        parts = []
        if aimed:
            lines = [self.line(case, True) for case in aimed]
            parts.append(report.markdown([*header, "target", "met"], lines))
        absolute = [row for row in self.rows if row["provider"] == report.OURS and row["case"] in aimed]
        lines = [line for row in absolute for line in self._absolute(row)]
        if lines:
            parts.append(report.markdown(["case", "target", "measured", "met"], lines))
        if others:
            parts.append(report.markdown(header, [self.line(case, False) for case in others]))
        return "\n\n".join([*parts, self.summary(aimed)])

    def _absolute(self, row: report.Row) -> Iterable[list[str]]:
        if (row["case"], self.dtype) not in targets.ABSOLUTE:
            return
        field, want = targets.ABSOLUTE[row["case"], self.dtype]
        scale, unit = {"gbs": (1e-3, "TB/s"), "tflops": (1, "TFLOP/s"), "median_us": (1, "us")}[field]
        met = row[field] <= want if field == "median_us" else row[field] >= want
        figures = [f"{scale * value:.3g} {unit}" for value in (want, row[field])]
        yield [row["case"], *figures, "yes" if met else "no"]

    def summary(self, aimed: list[str]) -> str:
        ratios = {case: ratio for case in self.cases if (ratio := self.ratio(case)) is not None}
        lines = []
        compared = [case for case in aimed if case in ratios]
        if compared:
            met = sum(round(ratios[case], 2) >= targets.RATIOS[case, self.dtype] for case in compared)
            lines.append(f"{met} of {len(compared)} targets met.")
        slower = sorted((ratio, case) for case, ratio in ratios.items() if ratio < 1 / ALLOWED)
        names = "".join(f"\n- {case}: {ratio:.2f}" for ratio, case in slower)
        if ratios:
            count = f"{len(slower)} of {len(ratios)} cases that one serves"
            lines.append(f"More than 5 % slower than the best peer: {count}.{names}")
        beside = [case for case in self.cases if (case, PORTABLE) in self.median]
        worse = [case for case in beside if self.median[case, report.OURS] > ALLOWED * self.median[case, PORTABLE]]
        if beside:
            names = "".join(f"\n- {case}" for case in worse)
            lines.append(f"More than 5 % slower than the portable kernel: {len(worse)} of {len(beside)} cases.{names}")
        return "\n\n".join(lines)


def versions(run: report.Row) -> str:
    """One line about the machine and the software of a run, its ceilings and its command."""
    row = next(row for row in run["rows"] if row["status"] == "ok")
    found = [row["gpu"], *(f"{name} {row[name]}" for name in ("torch", "cuda", "triton"))]
    providers = dict.fromkeys(row["version"] for row in run["rows"] if row.get("version"))
    ceilings = run.get("ceilings") or {}
    rates = [f"{name} {ceilings[name]:.0f}" for name in ("copy_gbs", "read_gbs", "matmul_tflops") if name in ceilings]
    command = run["command"] if isinstance(run["command"], str) else " ".join(run["command"])
    return f"{', '.join([*found, *providers])}. {', '.join(rates)}.\n\n    {command}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="JSON files of bench_decode.py")
    parser.add_argument(
        "--chain",
        type=lambda name: Chain.load(pathlib.Path(name)),
        metavar="JSON",
        help="a JSON file of latency_floor.py",
    )
    args = parser.parse_args()
    for path in args.runs:
        run = json.loads(path.read_text())
        print(f"# {path.name}\n\nMedian microseconds. {versions(run)}\n")
        for dtype in dict.fromkeys(row["dtype"] for row in run["rows"] if row["status"] == "ok"):
            table = Table(run, dtype)
            parts = [table.text(), table.below_chain(args.chain) if args.chain else ""]
            print(f"## {dtype} cache\n\n" + "\n\n".join(filter(None, parts)) + "\n")


if __name__ == "__main__":
    main()

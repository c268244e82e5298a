# SPDX-License-Identifier: Apache-2.0
"""Draws two pictures of saved benchmark runs: a roofline and a latency comparison, one panel per cache dtype.

    python benchmarks/plot.py run.json --out benchmarks/results/h200

Several JSON files are drawn as one run; a later file's row replaces an earlier one's. Writes roofline.png and
latency.png (or .svg with --format svg).
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.cases import Case

# Colours that stay apart for colour-blind readers (Okabe and Ito); this project's own is the strong one.
STYLES = {
    "fusedmla": ("#D55E00", "o"),
    "flashmla": ("#0072B2", "s"),
    "fa3": ("#009E73", "^"),
    "flashinfer": ("#CC79A7", "D"),
    "triton_mla": ("#999999", "v"),
    "fusedmla-noschedule": ("#E69F00", "o"),
}
SPARE = [("#56B4E9", "P"), ("#F0E442", "X"), ("#000000", "*")]
RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
}


def load(paths: list[pathlib.Path]) -> dict[str, Any]:
    """Rows of several runs as one; ceilings of the last run that has any."""
    rows: dict[tuple, report.Row] = {}
    ceilings: dict[str, float] = {}
    for path in paths:
        run = json.loads(path.read_text())
        ceilings = run.get("ceilings") or ceilings
        rows |= {report.key(row): row for row in run["rows"] if row["status"] == "ok"}
    if not rows:
        raise ValueError(f"no measured rows in {', '.join(path.name for path in paths)}")
    return {"rows": list(rows.values()), "ceilings": ceilings}


def style(name: str, names: list[str]) -> tuple[str, str]:
    if name in STYLES:
        return STYLES[name]
    others = [other for other in names if other not in STYLES]
    return SPARE[others.index(name) % len(SPARE)]


def subtitle(rows: list[report.Row]) -> str:
    row = rows[0]
    return f"{row['gpu']}, torch {row['torch']}, Triton {row['triton']}; L2 flushed, median of {row['reps']}"


def roofline(run: dict[str, Any]) -> plt.Figure:
    """TFLOP/s over FLOP per byte, below the memory and matmul rates measured in the same run."""
    rows, ceilings = run["rows"], run["ceilings"]
    dtypes = sorted({row["dtype"] for row in rows})
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 4.2), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for name in reversed(names):  # this project's, usually first, on top
            chosen = [row for row in rows if row["provider"] == name and row["dtype"] == dtype]
            if not chosen:
                continue
            colour, marker = style(name, names)
            cases = [Case.parse(row["case"]) for row in chosen]
            intensity = [case.flops() / case.min_bytes(dtype) for case in cases]
            rates = [row["tflops"] for row in chosen]
            axis.scatter(intensity, rates, s=26, color=colour, marker=marker, alpha=0.85, lw=0, label=name, zorder=3)
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="FLOP per byte that must move", title=f"{dtype} cache")
        for part in (axis.xaxis, axis.yaxis):
            part.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        draw_ceilings(axis, ceilings)
    axes[0][0].set_ylabel("TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(names))
    figure.suptitle(f"MLA decode against the roofline\n{subtitle(rows)}", fontsize=9)
    return figure


def memory_rate(ceilings: dict[str, float]) -> tuple[str, float]:
    """What bounds a kernel that reads, and GB/s: the read rate, in runs that did not measure it the copy rate, or 0."""
    return ("read", ceilings["read_gbs"]) if "read_gbs" in ceilings else ("copy", ceilings.get("copy_gbs", 0.0))


def draw_ceilings(axis: plt.Axes, ceilings: dict[str, float]) -> None:
    (kind, rate), matmul = memory_rate(ceilings), ceilings.get("matmul_tflops")
    low, high = axis.get_xlim()
    if rate and matmul:
        ridge = matmul * 1e3 / rate
        high = max(high, 2 * ridge)
        points = [low, ridge, high]
        axis.plot(points, [min(matmul, x * rate / 1e3) for x in points], color="#333333", lw=1.2, zorder=2)
        text = {"fontsize": 8, "color": "#333333", "zorder": 2}
        axis.text(low * 1.1, low * 1.1 * rate / 1e3, f"{kind} {rate / 1e3:.2f} TB/s", rotation=20, va="bottom", **text)
        axis.text(ridge, matmul * 1.08, f"bf16 matmul {matmul:.0f} TFLOP/s", va="bottom", **text)
        axis.set_ylim(top=max(axis.get_ylim()[1], matmul * 2))
        axis.set_xlim(low, high)


def latency(run: dict[str, Any]) -> plt.Figure:
    """Microseconds per call, a line of markers for each case, with the time the bytes alone would take."""
    rows = run["rows"]
    kind, rate = memory_rate(run["ceilings"])
    dtypes = sorted({row["dtype"] for row in rows})
    names = list(dict.fromkeys(row["provider"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    height = 1.6 + 0.26 * len(cases)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.6 * len(dtypes), height), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for place, case in enumerate(cases):
            times = [row["median_us"] for row in rows if row["case"] == case and row["dtype"] == dtype]
            if times:
                axis.plot(
                    [min(times), max(times)], [place, place], color="#d0d0d0", lw=3, solid_capstyle="round", zorder=1
                )
            if times and rate:
                floor = Case.parse(case).min_bytes(dtype) / rate / 1e3
                axis.plot([floor, floor], [place - 0.3, place + 0.3], color="#333333", lw=1.4, zorder=2)
        for name in reversed(names):
            chosen = [row for row in rows if row["provider"] == name and row["dtype"] == dtype]
            colour, marker = style(name, names)
            places = [cases.index(row["case"]) for row in chosen]
            times = [row["median_us"] for row in chosen]
            axis.scatter(
                times, places, s=34, color=colour, marker=marker, label=name, lw=0.4, edgecolor="white", zorder=3
            )
        axis.set(xscale="log", xlabel="microseconds per call (log)", title=f"{dtype} cache")
        axis.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axes[0][0].set_yticks(range(len(cases)), cases, family="monospace")
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    if rate:
        handles = [plt.Line2D([], [], color="#333333", lw=1.4), *handles]
        labels = [f"bytes / {kind} rate", *labels]
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4)
    figure.suptitle(f"MLA decode latency\n{subtitle(rows)}", fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN.json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder for the pictures")
    parser.add_argument("--providers", help="comma-separated; all by default")
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    args = parser.parse_args(argv)
    run = load(args.runs)
    if args.providers:
        run["rows"] = [row for row in run["rows"] if row["provider"] in args.providers.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(RC):
        for name, draw in (("roofline", roofline), ("latency", latency)):
            figure = draw(run)
            figure.set_layout_engine("constrained")
            path = args.out / f"{name}.{args.format}"
            figure.savefig(path, dpi=160)
            plt.close(figure)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

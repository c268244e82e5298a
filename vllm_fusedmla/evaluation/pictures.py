# SPDX-License-Identifier: Apache-2.0
"""Pictures of a comparison: differences with their intervals, divergences, and scores by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_COLOURS = {"same": "tab:green", "worse": "tab:red", "better": "tab:orange", "not enough data": "tab:gray"}


def draw(summary: dict[str, Any], out: Path) -> list[str]:
    """Write the pictures that the summary has data for into `out`; their file names."""
    import matplotlib

    matplotlib.use("Agg")
    names = []
    rows = [row for row in summary["comparisons"] if row["kind"] != "fault"]
    if rows:
        names.append(_differences(rows, summary["settings"]["margin"], out / "differences.png"))
    if summary["forced"]:
        names.append(_divergences(summary["forced"], out / "divergence.png"))
    tasks = sorted({task for tables in summary["maps"].values() for task in tables})
    for task in tasks:
        tables = {run: maps[task] for run, maps in summary["maps"].items() if task in maps and "+" not in run}
        if tables:
            names.append(_heat_maps(task, tables, out / f"{task}.png"))
    return names


def _save(figure: Any, path: Path) -> str:
    from matplotlib import pyplot

    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
    return path.name


def _differences(rows: Sequence[Row], margin: float, path: Path) -> str:
    """A line for each comparison of scores: the difference and its interval, in points."""
    from matplotlib import pyplot

    rows = [row for row in rows if not row["metric"].startswith("log-likelihood")] or list(rows)
    # One line for each task: right or wrong, where a task says so, and not how much of an answer was right.
    clear = {row["task"] for row in rows if row["binary"]}
    rows = [row for row in rows if row["binary"] or row["task"] not in clear]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(rows)))
    for place, row in enumerate(rows):
        centre, low, high = (100 * row[name] for name in ("difference", "low", "high"))
        colour = _COLOURS[row["verdict"]]
        axes.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(centre, place, "o", color=colour, markersize=5)
    axes.axvspan(-100 * margin, 100 * margin, color="tab:green", alpha=0.1)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{row['other_run']} - {row['base_run']}\n{row['measure']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("difference in points, 95 % interval")
    handles = [pyplot.Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in _COLOURS.items()]
    axes.legend(handles=handles, fontsize=6)
    return _save(figure, path)


def _divergences(rows: Sequence[Row], path: Path) -> str:
    """A bar for each teacher-forced pair, on a logarithmic scale, and its limit."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(rows)))
    least = 1e-9  # equal bits have no place on a logarithmic scale
    for place, row in enumerate(rows):
        colour = "tab:red" if row["differs"] else "tab:blue" if row["kl_limit"] is not None else "tab:gray"
        axes.barh(place, max(row["kl"], least), color=colour, height=0.6)
        if row["kl_limit"] is not None:
            axes.plot([row["kl_limit"]] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_xscale("log")
    axes.set_xlim(left=least)
    axes.set_yticks(range(len(rows)), [f"{row['other_run']} | {row['base_run']}" for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("KL divergence per token, nats (black: limit)")
    return _save(figure, path)


def _heat_maps(task: str, tables: dict[str, list[Row]], path: Path) -> str:
    """One map for each configuration: length down, depth across."""
    from matplotlib import pyplot

    lengths = sorted({cell["length"] for cells in tables.values() for cell in cells})
    depths = sorted({cell["depth"] for cells in tables.values() for cell in cells})
    columns = min(len(tables), 4)
    lines = -(-len(tables) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.4 * lines), squeeze=False)
    for place, axis in zip(axes.flat, [*tables, *[None] * (lines * columns - len(tables))], strict=True):
        if axis is None:
            place.axis("off")
            continue
        values = {(cell["length"], cell["depth"]): cell["value"] for cell in tables[axis]}
        grid = [[values.get((length, depth), float("nan")) for depth in depths] for length in lengths]
        place.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                place.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
        place.set_xticks(range(len(depths)), ["any" if depth < 0 else f"{depth:g}" for depth in depths], fontsize=6)
        place.set_yticks(range(len(lengths)), [f"{length:.0f}" for length in lengths], fontsize=6)
        place.set_title(axis, fontsize=7)
    figure.suptitle(f"{task}: score by length (down) and depth (across)", fontsize=9)
    figure.tight_layout()
    return _save(figure, path)

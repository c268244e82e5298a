# SPDX-License-Identifier: Apache-2.0
"""What happens with measured rows: derived figures, tables, files, and the comparison with an older run."""

import csv
import json
import os
import pathlib
from typing import Any, Protocol

from benchmarks import targets

Row = dict[str, Any]
REGRESSION = 0.05
"""A row slower than the old one by more than this fraction is a regression."""
OURS = "fusedmla"


class Counted(Protocol):
    """A case: what any kernel must move and compute."""

    def min_bytes(self, dtype: str) -> int: ...

    def flops(self) -> int: ...


def figures(case: Counted, dtype: str, median_us: float, ceilings: dict[str, float]) -> Row:
    """GB/s, TFLOP/s and their shares of the measured copy, read and matmul ceilings (absent where not measured)."""
    seconds = median_us * 1e-6
    gbs = case.min_bytes(dtype) / seconds / 1e9
    tflops = case.flops() / seconds / 1e12
    row: Row = {"gbs": gbs, "tflops": tflops}
    if ceilings.get("copy_gbs"):
        row["copy_percent"] = 100 * gbs / ceilings["copy_gbs"]
    if ceilings.get("read_gbs"):
        row["read_percent"] = 100 * gbs / ceilings["read_gbs"]
    if ceilings.get("matmul_tflops"):
        row["matmul_percent"] = 100 * tflops / ceilings["matmul_tflops"]
    return row


def key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["provider"], row["dtype"]


def write_json(path: pathlib.Path, run: Row) -> None:
    """Replace the file in one step: an interrupted run leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(temporary, path)


def write_csv(path: pathlib.Path, rows: list[Row]) -> None:
    """One line a row; the columns are the union of all rows' fields, in order of first appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table padded to equal widths, first column to the left, others to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def text(line: list[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |"
    return "\n".join([text(header), rule, *(text(line) for line in lines)])


def time_text(row: Row | None) -> str:
    """A cell: the median in microseconds, or why there is none."""
    if row is None:
        return ""
    if row["status"] in ("ok", "FAIL"):
        number = f"{row['median_us']:.1f}" if row["median_us"] < 1000 else f"{row['median_us']:.0f}"
        return number if row["status"] == "ok" else f"{number} FAIL"
    return {"unsupported": "-", "absent": "absent"}.get(row["status"], "error")


def table(rows: list[Row], dtype: str, peers_of: str = OURS) -> str:
    """Cases down, providers across, median microseconds; then our figures, and the best peer's time over ours.

    With a last column for what that ratio is to be, if any of the cases has such a target.
    """
    chosen = [row for row in rows if row["dtype"] == dtype]
    found = {key(row): row for row in chosen}
    cases = list(dict.fromkeys(row["case"] for row in chosen))
    names = [
        name
        for name in dict.fromkeys(row["provider"] for row in chosen)
        if any(row["provider"] == name and row["status"] != "absent" for row in chosen)
    ]
    header = [f"{dtype}: case, median us", *names, "GB/s", "% copy", "% read", "TF/s", "% mma", "peer/ours"]
    aims = {case: targets.RATIOS[case, dtype] for case in cases if (case, dtype) in targets.RATIOS}
    header += ["target"] if aims else []
    lines = []
    for case in cases:
        ours = found.get((case, peers_of, dtype))
        line = [case, *(time_text(found.get((case, name, dtype))) for name in names)]
        if ours is not None and ours["status"] in ("ok", "FAIL"):
            best = best_peer(chosen, case)
            line += [
                f"{ours['gbs']:.0f}",
                f"{ours['copy_percent']:.0f}" if "copy_percent" in ours else "",
                f"{ours['read_percent']:.0f}" if "read_percent" in ours else "",
                f"{ours['tflops']:.0f}",
                f"{ours['matmul_percent']:.0f}" if "matmul_percent" in ours else "",
                f"{best / ours['median_us']:.2f}" if best else "",
            ]
        else:
            line += [""] * 6
        if aims:
            line.append(f"{aims[case]:.1f}" if case in aims else "")
        lines.append(line)
    return markdown(header, lines)


def best_peer(rows: list[Row], case: str) -> float | None:
    """Fastest correct median of a case among the providers that are not this project's."""
    times = [
        row["median_us"]
        for row in rows
        if row["case"] == case and row["status"] == "ok" and not row["provider"].startswith((OURS, "reference"))
    ]
    return min(times, default=None)


def notes(rows: list[Row]) -> list[str]:
    """One line for every absent provider, error, failed check and unusual way of timing, without repetition."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "absent":
            lines.setdefault(f"note: {row['provider']} is absent: {row['note']}", [])
        elif row["note"]:
            kind = row["status"] if row["status"] in ("FAIL", "error") else "note"
            lines.setdefault(f"{kind}: {row['provider']} {row['dtype']}: {row['note']}", []).append(row["case"])
    return [f"{text}{' [' + ', '.join(cases) + ']' if cases else ''}" for text, cases in lines.items()]


def compare(rows: list[Row], old: list[Row], threshold: float = REGRESSION) -> tuple[str, bool]:
    """Table of new against old medians, and whether any row got slower by more than `threshold`.

    Only rows that both runs measured correctly are compared; a row that was measured and now fails is a regression.
    """
    before = {key(row): row for row in old if row["status"] == "ok"}
    lines, worse = [], False
    for row in rows:
        earlier = before.get(key(row))
        if earlier is None or row["status"] in ("absent", "unsupported"):
            continue
        measured = row["status"] == "ok"
        change = row["median_us"] / earlier["median_us"] - 1 if measured else float("inf")
        regressed = change > threshold
        worse |= regressed
        lines.append(
            [
                f"{row['case']} {row['dtype']}",
                row["provider"],
                f"{earlier['median_us']:.1f}",
                f"{row['median_us']:.1f}" if measured else row["status"],
                f"{100 * change:+.1f}%" if measured else "",
                "REGRESSION" if regressed else "",
            ]
        )
    return markdown(["case", "provider", "old us", "new us", "change", ""], lines), worse

# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_fusedmla schedule`: draw how the tile scheduler divides a batch among the programs of the GPU."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import NamedTuple

from .kernels.schedule import ScheduleParams, build_schedule_host
from .shapes import FAINT, GRID, HEIGHT, INK, PAPER, WIDTH, Line, Rect, Shape, Text

LEFT, RIGHT, TOP, BOTTOM = 56, 220, 112, 52
COLOURS = ("#2f6fb2", "#e07a3f", "#3a9d6c", "#c9485b", "#7d5fb8", "#d9a92e", "#3fa7b8", "#a0694f")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LEGEND_ROWS = 15


class Item(NamedTuple):
    """A range of KV tiles of one request."""

    request: int
    begin: int
    end: int


@dataclass(frozen=True)
class Picture:
    """A schedule, program by program.

    Attributes:
        seq_lens: tokens of each request.
        fixed: cost of starting an item, in tiles.
        programs: the items of each program in their order.
        facts: how the plan was made, in words.
    """

    seq_lens: list[int]
    fixed: int
    programs: list[list[Item]]
    facts: str

    @classmethod
    def build(cls, seq_lens: list[int], params: ScheduleParams, facts: str) -> Picture:
        """Run the host scheduler and sort its items by program."""
        import torch

        schedule = build_schedule_host(torch.tensor(seq_lens, dtype=torch.int32), params)
        begin = schedule.program_begin.tolist()
        items = [Item(*row[:3]) for row in schedule.items[: begin[-1]].tolist()]
        programs = [items[lo:hi] for lo, hi in zip(begin, begin[1:], strict=False)]
        return cls(seq_lens, params.fixed_tiles, programs, facts)

    @property
    def loads(self) -> list[int]:
        """Tiles of each program, the fixed cost of its items included."""
        return [sum(self.fixed + item.end - item.begin for item in items) for items in self.programs]

    def summary(self) -> list[str]:
        """What the picture shows, in sentences."""
        loads = self.loads
        mean = sum(loads) / len(loads)
        items = [item for part in self.programs for item in part]
        parts = [sum(item.request == r for item in items) for r in range(len(self.seq_lens))]
        split = [n for n in parts if n > 1]
        tiles = sum(item.end - item.begin for item in items)
        requests = "1 request" if len(self.seq_lens) == 1 else f"{len(self.seq_lens)} requests"
        return [
            f"{requests}, {sum(self.seq_lens)} tokens, {tiles} tiles over {len(loads)} programs",
            self.facts,
            f"load: max {max(loads)}, mean {mean:.2f} tiles (starting an item counts {self.fixed}), "
            f"imbalance {max(loads) / mean:.3f}, idle programs {loads.count(0)}",
            f"splits: {len(split)} of {requests} in {sum(split)} parts, at most {max(parts)} each",
        ]


def colour(request: int) -> str:
    """A colour of its own for each request: hand-picked ones first, then steps of the golden angle."""
    if request < len(COLOURS):
        return COLOURS[request]
    rgb = colorsys.hls_to_rgb(request * 0.381966 % 1.0, (0.42, 0.55, 0.66)[request % 3], 0.5)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _ticks(top: int, most: int) -> range:
    step = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if top / s <= most)
    return range(0, top + 1, step)


def draw(picture: Picture) -> list[Shape]:
    """Lay out the picture: programs across, tiles up, a colour a request, paler where an item's fixed cost is."""
    loads, count = picture.loads, len(picture.programs)
    top, right, bottom = max(loads), WIDTH - RIGHT, HEIGHT - BOTTOM
    unit, column = (bottom - TOP) / (top * 1.03), (right - LEFT) / count
    gap = min(2.0, column / 6)
    shapes: list[Shape] = []
    for tick in _ticks(top, 8):
        shapes.append(Line(LEFT, bottom - tick * unit, right, bottom - tick * unit, GRID))
        shapes.append(Text(LEFT - 8, bottom - tick * unit + 4, str(tick), "end"))
    for tick in _ticks(count - 1, 12):
        shapes.append(Text(LEFT + (tick + 0.5) * column, bottom + 18, str(tick), "middle"))
    for program, items in enumerate(picture.programs):
        x, y = LEFT + program * column + gap / 2, float(bottom)
        for item in items:
            for tiles, opacity in ((picture.fixed, 0.35), (item.end - item.begin, 1.0)):
                y -= tiles * unit
                shapes.append(Rect(x, y, column - gap, tiles * unit, colour(item.request), opacity))
            shapes.append(Line(x, y, x + column - gap, y, PAPER))
    mean = bottom - sum(loads) / count * unit
    shapes += [Line(LEFT, bottom, right, bottom, INK), Line(LEFT, mean, right, mean, INK, True)]
    heading, facts, load, _ = picture.summary()
    shapes += [Text(LEFT, 30, heading, size=18), Text(LEFT, 51, facts), Text(LEFT, 70, load)]
    shapes.append(Text(LEFT, TOP - 14, "KV tiles (pale: cost of starting an item; dashed: mean load)", colour=FAINT))
    shapes.append(Text((LEFT + right) / 2, HEIGHT - 12, "program", "middle"))
    b = len(picture.seq_lens)
    for row in range(min(b, LEGEND_ROWS)):
        y = TOP + 12 + 26 * row
        if row == LEGEND_ROWS - 1 and b > LEGEND_ROWS:
            shapes.append(Text(right + 40, y, f"and {b - row} more", colour=FAINT))
            break
        parts = sum(item.request == row for items in picture.programs for item in items)
        label = f"{picture.seq_lens[row]} tokens" + (f", {parts} parts" if parts > 1 else "")
        shapes += [Rect(right + 20, y - 11, 13, 13, colour(row)), Text(right + 40, y, label)]
    return shapes


def text_picture(picture: Picture, width: int = 72, height: int = 12) -> str:
    """The picture in letters, one a request, `.` for an item's fixed cost; wide schedules show every n-th program."""
    top, every = max(picture.loads), -(-len(picture.programs) // width)
    height = min(height, top)
    columns = []
    for items in picture.programs[::every]:
        cells = "".join("." * picture.fixed + LETTERS[i.request % len(LETTERS)] * (i.end - i.begin) for i in items)
        cells = cells.ljust(top)
        columns.append([cells[int((row + 0.5) * top / height)] for row in range(height)])
    rows = ["".join(column[row] for column in columns).rstrip() for row in reversed(range(height))]
    labels = [str(round((row + 1) * top / height)).rjust(7) for row in reversed(range(height))]
    lines = [f"{label} |{row}" for label, row in zip(labels, rows, strict=True)]
    first = [f"{LETTERS[r]}={tokens}" for r, tokens in enumerate(picture.seq_lens[:8])]
    more = f" and {len(picture.seq_lens) - 8} more" if len(picture.seq_lens) > 8 else ""
    return "\n".join([*lines, f"  tiles  programs 0 to {len(picture.programs) - 1}; tokens {' '.join(first)}{more}"])

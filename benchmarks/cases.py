# SPDX-License-Identifier: Apache-2.0
"""What is measured: launch shapes of MLA decode, their names, and the bytes and operations each cannot avoid."""

import dataclasses
import math
import random
import re

D_V = 512
D_QK = 576
CACHE_ROW_BYTES = {"bf16": 2 * D_QK, "fp8": D_QK, "fp8_ds_mla": D_V + 4 * 4 + 2 * (D_QK - D_V)}
"""Bytes of a cached token; `fp8_ds_mla` is 512 e4m3 values, 4 float32 scales and 64 bf16 values."""
DEFAULT_PAGE_SIZE = 64

_NAME = re.compile(
    r"b(?P<b>\d+)(?: s_q(?P<s_q>\d+))? h(?P<h>\d+) "
    r"(?:kv(?P<kv>\d+)|ragged(?P<low>\d+)-(?P<high>\d+))(?: page(?P<page>\d+))?"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch shape.

    Attributes:
        b: requests in the batch.
        h_q: query heads of one rank.
        kv: keys per request, or (low, high) for lengths drawn log-uniformly between the two.
        s_q: query tokens per request; the keys include them.
        page_size: tokens per cache page.
    """

    b: int
    h_q: int
    kv: int | tuple[int, int]
    s_q: int = 1
    page_size: int = DEFAULT_PAGE_SIZE

    @property
    def name(self) -> str:
        s_q = f" s_q{self.s_q}" if self.s_q > 1 else ""
        kv = f"kv{self.kv}" if isinstance(self.kv, int) else f"ragged{self.kv[0]}-{self.kv[1]}"
        page = f" page{self.page_size}" if self.page_size != DEFAULT_PAGE_SIZE else ""
        return f"b{self.b}{s_q} h{self.h_q} {kv}{page}"

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case called `name`, the inverse of the property `name`.

        Raises:
            ValueError: `name` is not of the form ``b4 s_q2 h16 kv4096 page32``, where s_q and page are optional and
                ``ragged256-65536`` may stand in place of ``kv4096``.
        """
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise ValueError(f"case must look like 'b4 s_q2 h16 kv4096 page32', got {name!r}")
        kv = int(match["kv"]) if match["kv"] else (int(match["low"]), int(match["high"]))
        return cls(
            int(match["b"]), int(match["h"]), kv, int(match["s_q"] or 1), int(match["page"] or DEFAULT_PAGE_SIZE)
        )

    def seq_lens(self) -> list[int]:
        """Keys of each request. Ragged lengths depend on b and the bounds alone: cases with other heads share them."""
        if isinstance(self.kv, int):
            return [self.kv] * self.b
        low, high = self.kv
        draw = random.Random(self.b)
        return [round(math.exp(draw.uniform(math.log(low), math.log(high)))) for _ in range(self.b)]

    def pages(self) -> list[int]:
        """Cache pages of each request."""
        return [-(-length // self.page_size) for length in self.seq_lens()]

    def min_bytes(self, dtype: str) -> int:
        """Bytes that any kernel must move: each key once in the cache's dtype, the bf16 query, the bf16 output."""
        rows = self.b * self.s_q * self.h_q
        return sum(self.seq_lens()) * CACHE_ROW_BYTES[dtype] + rows * 2 * (D_QK + D_V)

    def flops(self) -> int:
        """Operations of both matrix products over the keys that the causal rows attend to, two per multiply-add."""
        attended = sum(max(0, n - self.s_q + 1 + i) for n in self.seq_lens() for i in range(self.s_q))
        return 2 * attended * self.h_q * (D_QK + D_V)


PEERS = [
    Case.parse(name)
    for name in (
        "b128 h128 kv4096",
        "b128 h128 kv8192",
        "b128 s_q2 h128 kv4096",
        "b128 h64 kv8192",
        "b128 h32 kv8192",
        "b128 h16 kv8192",
        "b32 h128 kv4096",
        "b32 h16 kv4096",
        "b64 s_q2 h16 kv4096",
        "b1 h128 kv131072",
        "b1 h16 kv131072",
        "b1 h128 kv8192",
        "b1 h16 kv8192",
        "b1 h16 kv1024",
        "b4 h16 kv4096",
    )
]
QUICK = [
    Case.parse(name)
    for name in (
        "b128 h128 kv8192",
        "b128 h64 kv8192",
        "b128 h16 kv8192",
        "b32 h16 kv4096",
        "b64 s_q2 h16 kv4096",
        "b1 h128 kv131072",
        "b1 h16 kv8192",
        "b1 h16 kv1024",
    )
]
TARGET = [
    Case.parse(name)
    for name in (
        *(f"b128 h{h} kv8192" for h in (16, 32, 64)),
        "b32 h16 kv4096",
        "b64 s_q2 h16 kv4096",
        *(f"b1 h{h} kv131072" for h in (16, 128)),
        *(f"b{b} h16 kv{kv}" for b in (1, 4, 8) for kv in (1024, 2048, 4096, 8192)),
        "b1 h128 kv8192",
        *(f"b128 h128 kv{kv}" for kv in (4096, 8192)),
        "b128 s_q2 h128 kv4096",
        *(f"b64 h{h} ragged256-65536" for h in (16, 128)),
    )
]
"""The launch shapes that this project set itself targets for."""
_OTHERS = [
    Case.parse(name)
    for name in (
        *(f"b128 h16 kv8192 page{page}" for page in (16, 32, 48, 128)),
        *(f"b32 h128 kv4096 page{page}" for page in (16, 32, 48, 128)),
        *(f"b1 h16 kv8192 page{page}" for page in (16, 48)),
        *(f"b64 h{h} kv4096" for h in (8, 12, 20, 24, 40, 48, 96)),
        *(f"b1 h{h} kv8192" for h in (8, 12, 20, 24, 40, 48, 96)),
        "b16 s_q4 h16 kv4096",
        "b33 s_q2 h20 ragged16-20000 page32",
    )
]
FULL = list(dict.fromkeys([*PEERS, *TARGET, *_OTHERS]))
GRIDS = {"peers": PEERS, "quick": QUICK, "target": TARGET, "full": FULL}


def select(grid: str, pattern: str | None = None, extra: list[str] | None = None) -> list[Case]:
    """Cases of a grid whose name matches the regular expression `pattern`, then the cases named in `extra`.

    Without a pattern, naming extra cases replaces the grid.
    """
    if extra and pattern is None:
        return [Case.parse(name) for name in extra]
    chosen = [case for case in GRIDS[grid] if pattern is None or re.search(pattern, case.name)]
    return chosen + [Case.parse(name) for name in extra or []]

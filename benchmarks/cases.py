# SPDX-License-Identifier: Apache-2.0
"""What is measured: launch shapes of MLA attention, their names, and the bytes and operations each cannot avoid."""

import dataclasses
import math
import random
import re

from benchmarks import targets

D_V = 512
D_QK = 576
CACHE_ROW_BYTES = {"bf16": 2 * D_QK, "fp8": D_QK, "fp8_ds_mla": D_V + 4 * 4 + 2 * (D_QK - D_V)}
"""Bytes of a cached token; `fp8_ds_mla` is 512 e4m3 values, 4 float32 scales and 64 bf16 values."""
DEFAULT_PAGE_SIZE = 64
DEFAULT_SPARSE_KV = 32768

_NAME = re.compile(
    r"(?:b(?P<b>\d+)(?: s_q(?P<s_q>\d+))?|prefill s(?P<s>\d+)) h(?P<h>\d+)(?: topk(?P<topk>\d+))?"
    r"(?: kv(?P<kv>\d+)| ragged(?P<low>\d+)-(?P<high>\d+))?(?: page(?P<page>\d+))?"
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
        topk: in sparse attention, distinct keys that each query token attends to; None in dense attention.
        prefill: whether the `s_q` tokens of one request are to be attended for by a prefill kernel; sparse only.
    """

    b: int
    h_q: int
    kv: int | tuple[int, int]
    s_q: int = 1
    page_size: int = DEFAULT_PAGE_SIZE
    topk: int | None = None
    prefill: bool = False

    def __post_init__(self) -> None:
        if self.topk is not None and not (isinstance(self.kv, int) and 0 < self.topk <= self.kv):
            raise ValueError(f"topk must be 1 to kv = {self.kv}, keys that all requests have, got {self.topk}")
        if self.prefill and (self.topk is None or self.b != 1):
            raise ValueError(f"prefill must be sparse and of one request, got topk {self.topk} and b {self.b}")

    @property
    def name(self) -> str:
        s_q = f" s_q{self.s_q}" if self.s_q > 1 else ""
        tokens = f"prefill s{self.s_q}" if self.prefill else f"b{self.b}{s_q}"
        kv = f" kv{self.kv}" if isinstance(self.kv, int) else f" ragged{self.kv[0]}-{self.kv[1]}"
        if self.topk is not None:
            kv = f" topk{self.topk}" + (kv if self.kv != DEFAULT_SPARSE_KV else "")
        page = f" page{self.page_size}" if self.page_size != DEFAULT_PAGE_SIZE else ""
        return f"{tokens} h{self.h_q}{kv}{page}"

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case called `name`, the inverse of the property `name`.

        Raises:
            ValueError: `name` is not of the form ``b4 s_q2 h16 kv4096 page32``, where s_q and page are optional and
                ``ragged256-65536`` may stand in place of ``kv4096``; or ``b4 s_q2 h16 topk2048 kv65536 page32`` or
                ``prefill s4096 h16 topk2048 kv65536``, where kv is optional too.
        """
        match = _NAME.fullmatch(name.strip())
        if match is None or (match["topk"] is None and (match["s"] or not (match["kv"] or match["low"]))):
            forms = "'b4 s_q2 h16 kv4096 page32', 'b4 h16 topk2048' or 'prefill s4096 h16 topk2048'"
            raise ValueError(f"case must look like {forms}, got {name!r}")
        kv: int | tuple[int, int] = int(match["kv"] or DEFAULT_SPARSE_KV)
        if match["low"]:
            kv = int(match["low"]), int(match["high"])
        return cls(
            b=int(match["b"] or 1),
            h_q=int(match["h"]),
            kv=kv,
            s_q=int(match["s_q"] or match["s"] or 1),
            page_size=int(match["page"] or DEFAULT_PAGE_SIZE),
            topk=int(match["topk"]) if match["topk"] else None,
            prefill=match["s"] is not None,
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

    def rows_read(self) -> int:
        """Cached rows that any kernel must read: all keys, or the distinct ones among those that lists name.

        For several lists of a request the number to expect of random ones.
        """
        if self.topk is None:
            return sum(self.seq_lens())
        return sum(round(kv * (1 - (1 - self.topk / kv) ** self.s_q)) for kv in self.seq_lens())

    def min_bytes(self, dtype: str) -> int:
        """Bytes that any kernel must move: each key once in the cache's dtype, the bf16 query, the bf16 output."""
        rows = self.b * self.s_q * self.h_q
        return self.rows_read() * CACHE_ROW_BYTES[dtype] + rows * 2 * (D_QK + D_V)

    def flops(self) -> int:
        """Operations of both matrix products over the keys that the rows attend to, two per multiply-add."""
        if self.topk is not None:
            attended = self.b * self.s_q * self.topk
        else:
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
TARGET = [Case.parse(name) for name in targets.DENSE]
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
SPARSE = [Case.parse(name) for name in targets.SPARSE]
GRIDS = {"peers": PEERS, "quick": QUICK, "target": TARGET, "full": FULL, "sparse": SPARSE}


def select(grid: str, pattern: str | None = None, extra: list[str] | None = None) -> list[Case]:
    """Cases of a grid whose name matches the regular expression `pattern`, then the cases named in `extra`.

    Without a pattern, naming extra cases replaces the grid.
    """
    if extra and pattern is None:
        return [Case.parse(name) for name in extra]
    chosen = [case for case in GRIDS[grid] if pattern is None or re.search(pattern, case.name)]
    return chosen + [Case.parse(name) for name in extra or []]

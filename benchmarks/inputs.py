# SPDX-License-Identifier: Apache-2.0
"""Random tensors of a case: one pool of cached rows, allocated once, of which every case takes shuffled pages.

Query and keys are standard normal. A logit is then a sum of 576 products times 576 ** -0.5, so standard normal too:
the softmax over n keys is neither uniform nor one-hot, and outputs are about sqrt(e / n) in size.
"""

import dataclasses
import itertools

import torch

from benchmarks.cases import CACHE_ROW_BYTES, D_QK, D_V, Case

KEY_STD = 0.1
"""Standard deviation of cached values, as in FlashMLA's tests, whose tolerance is used; that of scores is 1."""
FP8_K_SCALE = 0.0173 * KEY_STD
"""Scale of the fp8 cache: no power of two, and 448 * 0.0173 = 7.8 standard deviations lie inside e4m3's range."""
_ROWS_AT_A_TIME = 1 << 16
_VALUES_AT_A_TIME = 1 << 26


@dataclasses.dataclass
class Inputs:
    """Tensors of one case.

    Attributes:
        case, dtype: what they are for; dtype is the cache's, "bf16", "fp8" or "fp8_ds_mla".
        q: ``[b, s_q, h_q, 576]`` bfloat16.
        cache: ``[num_pages, page_size, 576]`` bfloat16, or float8_e4m3fn holding key / k_scale; or
            ``[num_pages, page_size, 656]`` uint8, whose float32 scales are no powers of two, except for prefill, which
            may convert rows to bfloat16 and so is given what vLLM's writer makes.
        block_table: ``[b, max_pages]`` int32, unused entries 0.
        seq_lens: ``[b]`` int32 on the device; `lengths` is the same on the host.
        k_scale: 0-dim float32; 1 but for fp8.
        indices: for sparse cases ``[b, s_q, topk]`` int32, random distinct positions of the request in random order.
        slots: the same keys as rows of the flattened cache.
    """

    case: Case
    dtype: str
    q: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    lengths: list[int]
    k_scale: torch.Tensor
    sm_scale: float = D_QK**-0.5
    indices: torch.Tensor | None = None
    slots: torch.Tensor | None = None

    @property
    def max_len(self) -> int:
        return max(self.lengths)

    def query_start(self) -> torch.Tensor:
        """First query row of each request, and the total: ``[b + 1]`` int32."""
        case = self.case
        return torch.arange(0, (case.b + 1) * case.s_q, case.s_q, dtype=torch.int32, device=self.q.device)


class Pool:
    """Random cached rows, shared by all cases of a dtype."""

    def __init__(self, rows: int, device: torch.device, seed: int = 0):
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rows = {"bf16": torch.empty(rows, D_QK, dtype=torch.bfloat16, device=device)}
        for chunk in self._rows["bf16"].split(_ROWS_AT_A_TIME):
            chunk.copy_(torch.randn(chunk.shape, device=device, generator=self._generator) * KEY_STD)

    @classmethod
    def for_cases(cls, cases: list[Case], device: torch.device) -> "Pool":
        return cls(max(sum(case.pages()) * case.page_size for case in cases), device)

    def _of(self, dtype: str, powers_of_two: bool) -> torch.Tensor:
        """Rows of a dtype; whether scales are powers of two matters to fp8_ds_mla only."""
        key = f"{dtype} by powers of two" if powers_of_two and dtype == "fp8_ds_mla" else dtype
        if key not in self._rows:
            source = self._rows["bf16"]
            width, kind = (D_QK, torch.float8_e4m3fn) if dtype == "fp8" else (CACHE_ROW_BYTES[dtype], torch.uint8)
            quantised = torch.empty(source.shape[0], width, dtype=kind, device=self._device)
            for chunk, target in zip(source.split(_ROWS_AT_A_TIME), quantised.split(_ROWS_AT_A_TIME), strict=True):
                target.copy_(_to_fp8(chunk) if dtype == "fp8" else _to_ds_mla(chunk, powers_of_two))
            self._rows[key] = quantised
        return self._rows[key]

    def inputs(self, case: Case, dtype: str) -> Inputs:
        """A fresh query and page order for `case`; the cached rows are the pool's first ones."""
        pages = case.pages()
        total = sum(pages)
        cache = self._of(dtype, case.prefill)[: total * case.page_size].view(total, case.page_size, -1)
        order = torch.randperm(total, generator=self._generator, device=self._device).to(torch.int32)
        table = torch.zeros(case.b, max(pages), dtype=torch.int32, device=self._device)
        ends = itertools.accumulate(pages)
        for row, (count, end) in enumerate(zip(pages, ends, strict=True)):
            table[row, :count] = order[end - count : end]
        lengths = case.seq_lens()
        q = torch.randn(case.b, case.s_q, case.h_q, D_QK, device=self._device, generator=self._generator) / KEY_STD
        indices = slots = None
        if case.topk is not None:
            indices = random_positions(case.b * case.s_q, case.seq_lens()[0], case.topk, self._generator)
            indices = indices.view(case.b, case.s_q, case.topk)
            slots = slots_of(indices, table, case.page_size)
        return Inputs(
            case=case,
            dtype=dtype,
            q=q.to(torch.bfloat16),
            cache=cache,
            block_table=table,
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=self._device),
            lengths=lengths,
            k_scale=torch.tensor(FP8_K_SCALE if dtype == "fp8" else 1.0, device=self._device),
            indices=indices,
            slots=slots,
        )


def random_positions(lists: int, kv: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    """``[lists, topk]`` int32: `topk` distinct positions below `kv` in random order, for each list anew."""
    chosen = torch.empty(lists, topk, dtype=torch.int32, device=generator.device)
    for part in chosen.split(max(_VALUES_AT_A_TIME // kv, 1)):
        keys = torch.rand(part.shape[0], kv, device=generator.device, generator=generator)
        part.copy_(keys.argsort(1)[:, :topk])
    return chosen


def slots_of(indices: torch.Tensor, block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Positions of requests ``[b, s_q, topk]`` as rows of the flattened cache, int32."""
    flat = indices.flatten(1).long()
    page = block_table.gather(1, flat // page_size)
    return (page * page_size + flat % page_size).int().view_as(indices)


def _to_fp8(rows: torch.Tensor) -> torch.Tensor:
    return (rows.float() / FP8_K_SCALE).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _to_ds_mla(rows: torch.Tensor, powers_of_two: bool) -> torch.Tensor:
    """Rows of 656 bytes: each quarter of the latent divided by its largest value / 448, or the next power of two."""
    groups = rows[:, :D_V].float().unflatten(1, (4, -1))
    scales = groups.abs().amax(-1).clamp_min(1e-4) / 448.0
    if powers_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (groups / scales.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(1)
    rope = rows[:, D_V:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (codes, scales, rope)], 1)

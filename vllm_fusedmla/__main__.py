# SPDX-License-Identifier: Apache-2.0
"""The command line: `fusedmla` and `python -m vllm_fusedmla`. Nothing but the standard library is imported here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .evaluation import cli as evaluation

H200 = ((9, 0), 132)
"""Compute capability and multiprocessors to draw for where there is no GPU."""


def parse_seq_lens(text: str) -> list[int]:
    """Read `100,8192x4,131072` as lengths in tokens; `x4` repeats."""
    lens: list[int] = []
    for part in text.split(","):
        length, _, times = part.partition("x")
        try:
            value, repeat = int(length), int(times or 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"seq-lens must look like 100,8192x4,131072, got {part!r}") from None
        if value < 0 or repeat < 1:
            raise argparse.ArgumentTypeError(f"seq-lens: lengths from 0, repeats from 1, got {part!r}")
        lens += [value] * repeat
    return lens


def parse_arch(text: str) -> tuple[int, int]:
    """Read a compute capability such as `9.0`."""
    try:
        major, minor = (int(part) for part in text.split("."))
    except ValueError:
        raise argparse.ArgumentTypeError(f"arch must look like 9.0, got {text!r}") from None
    return major, minor


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="fusedmla", description="FUSEDMLA: MLA decode kernels for vLLM")
    parser.add_argument("--version", action="version", version=f"vllm-fusedmla {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="check this installation and say what would serve")
    doctor.add_argument("--json", action="store_true", help="machine-readable report")
    doctor.set_defaults(run=run_doctor)

    schedule = commands.add_parser("schedule", help="draw how a batch is divided among the GPU's programs")
    schedule.add_argument("--seq-lens", type=parse_seq_lens, required=True, help="tokens, such as 100,8192x4,131072")
    schedule.add_argument("--heads", type=positive, required=True, help="query heads on the GPU, h_q, up to 128")
    schedule.add_argument("--s-q", type=positive, default=1, help="query tokens a request, up to 8 (default 1)")
    schedule.add_argument("--cache", default="bf16", choices=("bf16", "fp16", "fp8"), help="KV cache (default bf16)")
    schedule.add_argument("--sms", type=positive, help="multiprocessors (default: this GPU's, or an H200's)")
    schedule.add_argument("--arch", type=parse_arch, help="compute capability (default: this GPU's, or 9.0)")
    schedule.add_argument("--batch-invariant", action="store_true", help="splits that depend on each length alone")
    schedule.add_argument("--block-n", type=positive, help="tokens of a KV tile (default: the kernel's)")
    schedule.add_argument("--out", type=Path, default=Path("schedule.svg"), help=".svg or .png (default schedule.svg)")
    schedule.set_defaults(run=run_schedule)

    evaluate = commands.add_parser("eval", help="compare a model's answers between backends and KV caches")
    evaluation.add_arguments(evaluate)
    evaluate.set_defaults(run=evaluation.main)
    return parser


def run_doctor(args: argparse.Namespace) -> int:
    """`fusedmla doctor`; 1 if there is a problem."""
    from .doctor import examine

    report = examine()
    print(report.to_json() if args.json else report.to_text())
    return 1 if report.problems else 0


def run_schedule(args: argparse.Namespace) -> int:
    """`fusedmla schedule`; 2 on bad arguments."""
    from dataclasses import replace

    from . import draw_schedule, shapes
    from .kernels.plan import make_plan
    from .kernels.select import MAX_H_Q, MAX_S_Q, select_decode

    if args.heads > MAX_H_Q or args.s_q > MAX_S_Q:
        raise ValueError(f"heads must be at most {MAX_H_Q} and s-q at most {MAX_S_Q}, got {args.heads} and {args.s_q}")
    if args.out.suffix not in (".svg", ".png"):
        raise ValueError(f"out must end in .svg or .png, got {args.out}")
    arch, sms = _this_gpu()
    arch, sms, rows = args.arch or arch, args.sms or sms, args.s_q * args.heads
    config = select_decode(arch, rows, args.cache)
    if args.block_n:
        config = replace(config, block_n=args.block_n)
    plan = make_plan(config, rows, sms, args.batch_invariant)
    row_blocks = -(-rows // config.block_h)
    facts = (
        f"{args.heads} heads, s_q {args.s_q}, {args.cache} cache, tiles of {config.block_n} tokens, {sms} SMs"
        + (f", {row_blocks} such grids, one for every {config.block_h} query rows" if row_blocks > 1 else "")
        + (", batch-invariant" if args.batch_invariant else "")
    )
    picture = draw_schedule.Picture.build(args.seq_lens, plan.params, facts)
    print(draw_schedule.text_picture(picture), *picture.summary(), sep="\n")
    write = shapes.write_png if args.out.suffix == ".png" else shapes.write_svg
    write(draw_schedule.draw(picture), args.out)
    print(f"written: {args.out}")
    return 0


def _this_gpu() -> tuple[tuple[int, int], int]:
    import torch

    if not torch.cuda.is_available():
        return H200
    properties = torch.cuda.get_device_properties(0)
    return (properties.major, properties.minor), properties.multi_processor_count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, ImportError) as error:
        print(f"fusedmla {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

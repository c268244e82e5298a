# SPDX-License-Identifier: Apache-2.0
"""What adding up many e4m3 products costs in accuracy: fp8 kernels on caches whose values have a mean.

Hopper's tensor cores keep about 14 bits of a sum of e4m3 products (DeepSeek-V3, arXiv 2412.19437, section 3.3), and
drop the rest. With values of mean 0 the sums stay small and nothing shows. With a mean they grow with every key, and
each further product loses part of itself, unless the kernel adds up short stretches apart.

    python benchmarks/long_sums.py --providers fusedmla,fusedmla-fp8mma,flashmla --json long_sums.json

Prints, for each provider, length and mean (in standard deviations of the values), the gain: the factor by which the
output is too large (1 is right), and the cosine difference of what remains, both against a float64 reference on the
same quantised inputs and the query as the kernel sees it.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import check, inputs, providers
from benchmarks.cases import Case

LENGTHS = (1024, 8192, 65536)
MEANS = (0.0, 0.25, 1.0)


def with_mean(x: inputs.Inputs, mean: float) -> None:
    """Shift all cached values by `mean` standard deviations, in place. Scores move all alike: the softmax stays."""
    for page in x.cache.split(1024):
        rows = page.float() * inputs.FP8_K_SCALE + mean * inputs.KEY_STD
        page.copy_((rows / inputs.FP8_K_SCALE).clamp(-448, 448).to(page.dtype))


def measure(provider: providers.Provider, x: inputs.Inputs) -> dict[str, float]:
    """Gain, cosine difference without it, and largest absolute error of the checked requests."""
    prepared = provider.prepare(x)
    out, _ = prepared.unpack(prepared.call())
    torch.cuda.synchronize()
    want = check.expected(x, prepared.q)
    got, right = out[want.requests].double(), want.out
    gain = float((got * right).sum() / (right * right).sum())
    cosine = float(1 - (got * right).sum() / (got.norm() * right.norm()))
    return {"gain": gain, "cosine_difference": cosine, "max_abs_error": float((got - right).abs().max())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--providers", default="fusedmla,fusedmla-fp8mma,flashmla")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    loaded = []
    for name in options.providers.split(","):
        provider = providers.ALL[name]()
        try:
            loaded.append((provider, provider.load()))
        except providers.Unavailable as reason:
            print(f"note: {name}: {reason}")
    cases = [Case(options.batch, options.heads, kv) for kv in LENGTHS]
    rows = []
    for mean in MEANS:
        pool = inputs.Pool.for_cases(cases, torch.device("cuda"))
        with_mean(pool.inputs(cases[-1], "fp8"), mean)  # all of the pool's rows
        for case in cases:
            x = pool.inputs(case, "fp8")
            for provider, version in loaded:
                row = {
                    "case": case.name,
                    "mean": mean,
                    "provider": provider.name,
                    "version": version,
                    **measure(provider, x),
                }
                rows.append(row)
                print(
                    f"{case.name:18} mean {mean:4.2f}  {provider.name:16} gain {row['gain']:.4f}  "
                    f"cosine {row['cosine_difference']:.1e}  largest error {row['max_abs_error']:.1e}",
                    flush=True,
                )
        del pool, x
        torch.cuda.empty_cache()
    if options.json:
        command = "python benchmarks/long_sums.py"
        command += f" --providers {options.providers} --batch {options.batch} --heads {options.heads}"
        facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": command, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

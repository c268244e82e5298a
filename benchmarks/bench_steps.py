# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step in vLLM, for one attention backend: every layer, the sampler and vLLM's own work included.

A long prompt is put into the prefix cache, then tokens are generated behind it. A step is the difference between
generating many tokens and generating one, divided by their number; full CUDA graphs. Run it once for each backend:

    python benchmarks/bench_steps.py --model MODEL --backend FUSEDMLA --json fusedmla.json

With --layers or --heads the model has as many of them, and random weights: as deep as a real one, at the size of the
models here, so that attention is what a step spends its time on.
"""

import argparse
import json
import os
import random
import statistics
import time

PAGE = 64
LATENT_BYTES = 2 * 576
"""Of a cached token and layer, at most."""


def step_us(llm, sampling_params, prompts, tokens: int, repeat: int) -> list[float]:
    """Wall-clock microseconds of a step, `repeat` times."""

    def seconds(count: int) -> float:
        sampling = sampling_params(max_tokens=count, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(tokens), seconds(1)
    return [(seconds(tokens + 1) - seconds(1)) / tokens * 1e6 for _ in range(repeat)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", default="FUSEDMLA")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, help="instead of the model's; weights are random then")
    parser.add_argument("--heads", type=int, help="likewise")
    parser.add_argument("--json")
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    changes = {}
    if args.layers:
        changes |= {"num_hidden_layers": args.layers, "first_k_dense_replace": args.layers}  # no experts
    if args.heads:
        changes |= {"num_attention_heads": args.heads, "num_key_value_heads": args.heads}
    tokens = max(args.batches) * (args.context + args.tokens + 2 * PAGE)
    llm = LLM(
        model=args.model,
        attention_backend=args.backend,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=PAGE,
        max_model_len=16384,
        max_num_seqs=max(args.batches),
        hf_overrides=changes,
        load_format="dummy" if changes else "auto",
        kv_cache_memory_bytes=max(tokens * (args.layers or 2) * LATENT_BYTES, 8 << 30),
        max_num_batched_tokens=16384,
        compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"},
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rows = []
    for b in args.batches:
        rng = random.Random(b)
        prompts = [{"prompt_token_ids": [rng.randrange(8, vocabulary) for _ in range(args.context)]} for _ in range(b)]
        times = step_us(llm, SamplingParams, prompts, args.tokens, args.repeat)
        row = {"backend": args.backend, "kv_cache_dtype": args.kv_cache_dtype, "b": b, "context": args.context}
        row |= {"kernel": os.environ.get("VLLM_FUSEDMLA_KERNEL", "auto"), "layers": args.layers, "heads": args.heads}
        rows.append(row | {"median_us": round(statistics.median(times), 1), "least_us": round(min(times), 1)})
        print(rows[-1], flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

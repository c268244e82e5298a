# SPDX-License-Identifier: Apache-2.0
"""Decode or prefill for a few new tokens behind a long cached context? One engine step of vLLM, timed both ways.

    VLLM_FUSEDMLA_DECODE_THRESHOLD=8 python benchmarks/bench_threshold.py --model DIR --json t8.json
    VLLM_FUSEDMLA_DECODE_THRESHOLD=1 python benchmarks/bench_threshold.py --model DIR --json t1.json

Every request has the same number of new tokens behind a prefix that vLLM's prefix cache holds. With a threshold of at
least that number the step goes through FUSEDMLA's decode, otherwise through vLLM's prefill, which expands the whole
cached context to keys and values of every head first. Prints the GPU time of one step, all kernels added up as
torch's profiler sees them: on a small model the host's share of a step would hide the difference.
"""

import argparse
import json
import os
import random
import statistics

PAGE = 64


def gpu_us(run) -> float:
    """Time of all GPU kernels that `run` launches in this process."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
    return sum(event.self_device_time_total for event in seen.key_averages())


def measure(llm, sampling, contexts, new_tokens: int, vocabulary: int, repeat: int) -> list[float]:
    """GPU time in microseconds of steps that add `new_tokens` random tokens to each cached context."""
    rng = random.Random(new_tokens)
    answers = []
    times = []
    for _ in range(repeat + 1):  # the first compiles
        suffix = [[rng.randrange(8, vocabulary) for _ in range(new_tokens)] for _ in contexts]
        prompts = [{"prompt_token_ids": c + s} for c, s in zip(contexts, suffix, strict=True)]
        times.append(gpu_us(lambda: answers.extend(llm.generate(prompts, sampling, use_tqdm=False))))  # noqa: B023
        cached = {answer.num_cached_tokens for answer in answers}
        answers.clear()
        if cached != {len(contexts[0])}:
            raise SystemExit(f"the context was to come from the prefix cache, {cached} tokens did")
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192], help="cached tokens, multiples of 64")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the profiler sees this process only
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.model,
        attention_backend="FUSEDMLA",
        block_size=PAGE,
        enforce_eager=True,
        max_model_len=16384,
        max_num_seqs=64,
        kv_cache_memory_bytes=4 << 30,
        max_num_batched_tokens=16384,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rows = []
    for b in args.batches:
        for context in args.contexts:
            rng = random.Random(b * context)
            contexts = [[rng.randrange(8, vocabulary) for _ in range(context)] for _ in range(b)]
            llm.generate([{"prompt_token_ids": c + [8]} for c in contexts], sampling, use_tqdm=False)
            for new_tokens in args.new_tokens:
                times = measure(llm, sampling, contexts, new_tokens, vocabulary, args.repeat)
                row = {
                    "threshold": os.environ.get("VLLM_FUSEDMLA_DECODE_THRESHOLD", "default"),
                    "b": b,
                    "context": context,
                    "new_tokens": new_tokens,
                    "median_us": round(statistics.median(times), 1),
                    "least_us": round(min(times), 1),
                }
                rows.append(row)
                print(row, flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

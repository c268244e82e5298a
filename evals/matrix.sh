#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every comparison of results/h200: bash evals/matrix.sh OUT MODELS
#
# MODELS holds tasks, tasks-dsa and unsaturated (evals/models/README.md has the commands that make them). All comparisons run
# at once, about 70 engines on the GPUs there are: four H200 and 64 cores take some five minutes. What is finished is kept, so
# a second call goes on where one was stopped.
set -u
out=$1 models=$2
cd "$(dirname "$0")/.."
decode_graphs='"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
small='"gpu_memory_utilization": 0.04, "kv_cache_memory_bytes": 2684354560, "max_num_seqs": 128'
dense=FUSEDMLA,FLASHMLA,FLASH_ATTN_MLA,TRITON_MLA
sparse=FUSEDMLA,FLASHMLA_SPARSE,FLASH_ATTN_MLA_SPARSE

engine() { echo "{\"max_model_len\": $1, \"max_num_batched_tokens\": $2, $small, $decode_graphs}"; }
sparse_engine() { # prompts are attended to by the sparse kernels too
    echo "{\"max_model_len\": $1, \"max_num_batched_tokens\": $2, $small, $decode_graphs, \"attention_config\": {\"sparse_mla_force_mqa\": true}}"
}
compare() {
    local name=$1
    shift
    python -m vllm_fusedmla eval --out "$out/$name" --timeout 400 "$@" > "$out/$name.log" 2>&1
    echo "$name: exit code $?"
}

mkdir -p "$out"
python -m evals.models.widen --model "$models/unsaturated" --out "$models/unsaturated-wide" --copies 16
python -m evals.models.outliers --model "$models/unsaturated" --out "$models/unsaturated-outliers"

recall='"fusedmla_chain_recall": {"n": 3000, "lengths": [8192]}'
compare unsaturated --model "$models/unsaturated" --backends $dense --kv-cache-dtypes auto,fp8 --tasks fusedmla_chain_recall \
    --task-args "{$recall}" --model-args "$(engine 8320 16384)" --teacher-forced none --parallel 5 &
compare unsaturated-wide --model "$models/unsaturated-wide" --backends $dense --kv-cache-dtypes auto,fp8 --tasks "" \
    --task-args "{$recall}" --model-args "$(engine 8320 16384)" --parallel 6 \
    --variant 'e4m3:FUSEDMLA:fp8={"environment": {"VLLM_FUSEDMLA_FP8_MMA": "1"}}' \
    --teacher-forced fusedmla_chain_recall --teacher-texts 256 --teacher-length 8192 --teacher-prompt 8128 &
compare unsaturated-outliers --model "$models/unsaturated-outliers" --backends $dense --kv-cache-dtypes auto,fp8 \
    --tasks fusedmla_chain_recall --task-args '{"fusedmla_chain_recall": {"n": 1000, "lengths": [4096]}}' \
    --model-args "$(engine 4224 16384)" --parallel 10 --teacher-texts 32 --teacher-length 4096 --teacher-prompt 3840 &
compare tasks --model "$models/tasks" --backends $dense --kv-cache-dtypes auto,fp8 \
    --tasks fusedmla_needles,fusedmla_variable_tracking,fusedmla_chain_recall,fusedmla_copy,fusedmla_modular \
    --task-args '{"fusedmla_needles": {"n": 1005}, "fusedmla_variable_tracking": {"n": 1005},
        "fusedmla_chain_recall": {"n": 1005}, "fusedmla_copy": {"n": 1005, "lengths": [1024, 4096, 8192]},
        "fusedmla_modular": {"n": 3000, "lengths": [256]}}' --model-args "$(engine 8320 16384)" --parallel 10 \
    --variant 'eager:FUSEDMLA:auto={"enforce_eager": true, "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"}}' \
    --teacher-forced fusedmla_text --teacher-texts 64 --teacher-length 512 &

long='{"n": 1000, "lengths": [2048, 4096]}'
texts=(--teacher-forced fusedmla_text --teacher-texts 64 --teacher-length 4096 --teacher-prompt 3584)
compare tasks-dsa --model "$models/tasks-dsa" --backends $sparse --kv-cache-dtypes auto,fp8_ds_mla \
    --tasks fusedmla_needles,fusedmla_variable_tracking,fusedmla_chain_recall,fusedmla_copy --parallel 14 \
    --task-args "{\"fusedmla_needles\": $long, \"fusedmla_variable_tracking\": $long, \"fusedmla_chain_recall\": $long,
        \"fusedmla_copy\": $long, \"fusedmla_text\": {\"lengths\": [4096]}}" --model-args "$(sparse_engine 4224 8192)" \
    --variant 'dense={"hf_overrides": {"index_topk": 4096}, "attention_config": {"sparse_mla_force_mqa": false}}' "${texts[@]}" &
VLLM_FUSEDMLA_INDEXER=1 compare tasks-dsa-indexer --model "$models/tasks-dsa" --backends FUSEDMLA \
    --kv-cache-dtypes auto,fp8_ds_mla --tasks "" --task-args '{"fusedmla_text": {"lengths": [4096]}}' \
    --model-args "$(sparse_engine 4224 8192)" --parallel 4 "${texts[@]}" &

everywhere=(merge_without_lse lost_page tile_scale k_scale_doubled softmax_scale rope_dropped stale_block_table)
compare faults-dense --model evals/models/demo --backends FUSEDMLA,FLASHMLA,TRITON_MLA --kv-cache-dtypes auto,fp8 \
    --tasks fusedmla_chain_recall --task-args '{"fusedmla_chain_recall": {"n": 200, "lengths": [1024]}}' \
    --model-args "$(engine 1152 16384)" --parallel 10 --teacher-length 640 --teacher-prompt 128 \
    --variant 'chunks:FUSEDMLA:auto={"long_prefill_token_threshold": 2, "enable_prefix_caching": false}' \
    "${everywhere[@]/#/--fault=}" --fault causal_off_by_one::chunks --fault tile_scale:fp8 --fault k_scale_doubled:fp8 &
faults=("${everywhere[@]/#/--fault=}" --fault=topk_off_by_one)
compare faults-sparse --model evals/models/demo-dsa --backends $sparse --kv-cache-dtypes auto,fp8_ds_mla \
    --tasks fusedmla_chain_recall --task-args '{"fusedmla_chain_recall": {"n": 200, "lengths": [2048]}}' \
    --model-args "$(sparse_engine 2176 8192)" --parallel 9 --teacher-length 2048 --teacher-prompt 1536 \
    "${faults[@]/%/:fp8_ds_mla}" &
wait

# SPDX-License-Identifier: Apache-2.0
"""The host's side of the CUDA top-k, on any machine: its parameter, its limits, and how many blocks share a row."""

import subprocess

import cubins
import pytest
import torch

from vllm_fusedmla.kernels.hopper import build, topk

MOST = {2: 66, 4: 31, 8: 15, 16: 7}
"""Clusters that run at once on a GPU of 132 multiprocessors whose groups do not all hold 16."""


def test_parameter_and_limits_are_those_of_the_kernel(tmp_path):
    nvcc = cubins.nvcc()
    names = [field[0] for field in topk.Params._fields_]
    checks = [f"offsetof(Params, {name}) == {getattr(topk.Params, name).offset}" for name in names]
    limits = {"kChunk": topk.LARGEST_CHUNK, "kCapacity": topk.LARGEST_K, "kMaxCtas": topk.LARGEST_CLUSTER}
    checks += [f"{name} == {value}" for name, value in limits.items()]
    asserts = "\n".join(f'static_assert({check}, "{check}");' for check in checks)
    source = tmp_path / "layout.cu"
    source.write_text(f'#define FUSEDMLA_ENTRY layout\n#include "topk.cu"\n#include <cstddef>\n{asserts}\n')
    flags = [flag for flag in build.FLAGS if flag.startswith(("-gencode", "arch=", "-std", "-cubin"))]
    command = [nvcc, *flags, "-I", build.FOLDER, source, "-o", tmp_path / "layout.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("rows", "n", "size"),
    [
        (1, 131072, 16),
        (7, 131072, 16),
        (8, 131072, 8),
        (16, 131072, 4),  # 8 would not run at once
        (32, 131072, 4),  # 4 does not either, but fewer do not hold a row
        (1000, 131072, 4),
        (1, 524288, 16),
        (1, 4096, 2),
        (1, 4, 1),
        (1000, 32768, 1),
        (1, 16384, 8),
    ],
)
def test_as_many_blocks_a_row_as_pay(rows, n, size):
    assert topk.cluster_size(rows, n, MOST.__getitem__) == size
    assert topk.LARGEST_CHUNK * size >= n


def test_other_devices_and_shapes_are_left_to_the_portable_kernel(monkeypatch):
    assert not topk.takes(torch.zeros(1, 64), 8)
    monkeypatch.setattr(topk, "_ready", lambda device: True)
    values = torch.zeros(1, 64 + 4)
    values = values[:, (-values.data_ptr() // 4) % 4 :]
    assert topk.takes(values[:, :64], 8)
    assert not topk.takes(values[:, :64], topk.LARGEST_K + 1)
    assert not topk.takes(values[:, 1:], 8)  # not at 16 bytes
    assert not topk.takes(torch.zeros(1, 1).expand(1, topk.LARGEST_CHUNK * topk.LARGEST_CLUSTER + 1), 8)
    assert not topk.takes(torch.zeros(1, 1).expand(1 << 16, 64), 8)

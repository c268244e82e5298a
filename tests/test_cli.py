# SPDX-License-Identifier: Apache-2.0
"""The command line, and the picture of a schedule."""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_fusedmla import __version__, envs
from vllm_fusedmla.__main__ import main, parse_arch, parse_seq_lens
from vllm_fusedmla.draw_schedule import Picture, colour, draw, text_picture
from vllm_fusedmla.kernels.schedule import ScheduleParams
from vllm_fusedmla.shapes import HEIGHT, WIDTH, Rect

SVG = "{http://www.w3.org/2000/svg}"


def random_picture(seed: int, batch_invariant: bool) -> tuple[Picture, ScheduleParams]:
    rng = random.Random(seed)
    seq_lens = [rng.choice((0, 1, 63, 64, 65, rng.randrange(1, 20000))) for _ in range(rng.randrange(1, 40))]
    params = ScheduleParams(rng.randrange(1, 140), rng.choice((16, 64)), 1, rng.randrange(1, 4), batch_invariant)
    return Picture.build(seq_lens, params, "a test"), params


def test_parse_seq_lens() -> None:
    assert parse_seq_lens("100,8192x3,0") == [100, 8192, 8192, 8192, 0]
    for text in ("", "5,", "-1", "8x0", "x3", "3.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="seq-lens"):
            parse_seq_lens(text)


def test_parse_arch() -> None:
    assert parse_arch("9.0") == (9, 0)
    with pytest.raises(argparse.ArgumentTypeError, match="arch must look like 9.0, got 'sm_90'"):
        parse_arch("sm_90")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_picture_shows_every_tile_once(seed: int, batch_invariant: bool) -> None:
    picture, params = random_picture(seed, batch_invariant)
    assert len(picture.programs) == params.num_programs
    for request, tokens in enumerate(picture.seq_lens):
        parts = sorted((i.begin, i.end) for items in picture.programs for i in items if i.request == request)
        assert [tile for begin, end in parts for tile in range(begin, end)] == list(range(-(-tokens // params.block_n)))
        assert parts, "a request without tokens has an item too: its output must be written"


def test_summary_counts(seed: int) -> None:
    picture, params = random_picture(seed, False)
    heading, facts, load, _ = picture.summary()
    tiles = sum(-(-tokens // params.block_n) for tokens in picture.seq_lens)
    items = sum(len(part) for part in picture.programs)
    requests = "1 request" if len(picture.seq_lens) == 1 else f"{len(picture.seq_lens)} requests"
    assert heading == f"{requests}, {sum(picture.seq_lens)} tokens, {tiles} tiles over {params.num_programs} programs"
    assert facts == "a test"
    mean = (tiles + items * params.fixed_tiles) / params.num_programs
    assert f"max {max(picture.loads)}, mean {mean:.2f} tiles" in load
    assert f"imbalance {max(picture.loads) / mean:.3f}" in load


def test_drawing_is_to_scale_and_inside(seed: int) -> None:
    picture, _ = random_picture(seed, False)
    shapes = [s for s in draw(picture) if isinstance(s, Rect)]
    for s in shapes:
        assert 0 <= s.x <= s.x + s.width <= WIDTH
        assert 0 <= s.y <= s.y + s.height <= HEIGHT
    # A pale and a full rectangle for each item, bottom up; heights in proportion to fixed cost and tiles.
    items = [item for part in picture.programs for item in part]
    bars = shapes[: 2 * len(items)]
    unit = bars[0].height / picture.fixed
    for item, pale, full in zip(items, bars[::2], bars[1::2], strict=True):
        assert pale.height == pytest.approx(picture.fixed * unit)
        assert full.height == pytest.approx((item.end - item.begin) * unit)
        assert pale.colour == full.colour == colour(item.request)
        assert full.y + full.height == pytest.approx(pale.y)


def test_colours_are_distinct() -> None:
    assert len({colour(request) for request in range(64)}) == 64


def test_text_picture_letters() -> None:
    picture = Picture.build([64 * 3, 64 * 3], ScheduleParams(2, 64, 1, 1), "")
    assert text_picture(picture).splitlines()[:4] == ["      4 |ab", "      3 |ab", "      2 |ab", "      1 |.."]


def test_schedule_command_writes_svg(tmp_path: Path, repo: Path, child_env: dict[str, str]) -> None:
    out = tmp_path / "picture.svg"
    command = [sys.executable, "-m", "vllm_fusedmla", "schedule", "--seq-lens", "100,8192,131072", "--heads", "16"]
    command += ["--sms", "132", "--arch", "9.0", "--block-n", "64", "--out", str(out)]
    done = subprocess.run(command, cwd=repo, env=child_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 requests, 139364 tokens, 2178 tiles over" in done.stdout
    assert "imbalance 1." in done.stdout
    root = ElementTree.fromstring(out.read_text())
    assert {colour(r) for r in range(3)} <= {rect.get("fill") for rect in root.iter(f"{SVG}rect")}
    texts = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert "131072 tokens" in texts and "16 heads, s_q 1, bf16 cache, tiles of 64 tokens, 132 SMs" in texts


def test_schedule_batch_invariant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["schedule", "--heads", "128", "--s-q", "2", "--batch-invariant", "--sms", "132", "--arch", "9.0"]
    parts = []
    for lens in ("8192", "8192,100x9,40000"):
        out = tmp_path / "picture.svg"
        assert main([*arguments, "--seq-lens", lens, "--out", str(out)]) == 0
        assert "batch-invariant" in capsys.readouterr().out
        texts = [text.text or "" for text in ElementTree.parse(out).iter(f"{SVG}text")]
        parts.append([text for text in texts if text.startswith("8192 tokens")])
    assert len(parts[0]) == 1 and "parts" in parts[0][0]
    assert parts[0][0] in parts[1], "the splits of a request must not depend on the batch"


def test_schedule_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "picture.png"
    code = main(["schedule", "--seq-lens", "100,5000", "--heads", "16", "--sms", "8", "--out", str(out)])
    if importlib.util.find_spec("matplotlib"):
        assert code == 0 and out.read_bytes().startswith(b"\x89PNG")
    else:
        assert code == 2 and 'pip install ".[bench]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "129"], "heads must be at most 128"),
        (["--heads", "16", "--s-q", "9"], "s-q at most 8"),
        (["--heads", "16", "--out", "picture.pdf"], "out must end in .svg or .png, got picture.pdf"),
        (["--heads", "16", "--arch", "7.5"], "compute capability 7.5"),
    ],
)
def test_schedule_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--seq-lens", "100", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-fusedmla {__version__}"
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_importing_the_package_imports_no_torch(repo: Path, child_env: dict[str, str]) -> None:
    code = "import sys, vllm_fusedmla, vllm_fusedmla.__main__, vllm_fusedmla.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, env=child_env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_readme_python(repo: Path) -> None:
    """README's examples run as they stand, and FlashMLA's function agrees with this project's own."""
    blocks = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    out, lse = names["out"], names["lse"]
    assert out.shape == (3, 1, 16, 512) and lse.shape == (3, 1, 16) and out.isfinite().all()
    # The second request has one key, so its output is that key's latent part.
    torch.testing.assert_close(out[1, 0], names["cache"][5, 0, :512].expand(16, -1))
    exec(blocks[1], names)
    torch.testing.assert_close(names["out"], out, atol=8e-4, rtol=2.01 / 128)
    torch.testing.assert_close(names["lse"].transpose(1, 2), lse)


def test_readme_names_every_variable(repo: Path) -> None:
    named = set(re.findall(r"`(VLLM_FUSEDMLA_\w+)`", (repo / "README.md").read_text()))
    assert named == set(envs.VARIABLES)

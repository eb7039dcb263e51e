"""Whole videos of tiny models: what the figures of benchmarks/whole_video.py mean."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("skimage", reason="scikit-image is not installed; `make test` installs it")

from benchmarks import trade_off, whole_video
from benchmarks.learned import load_model
from benchmarks.small_models import SmallModel, percent_of
from benchmarks.video_methods import DenseAttention, Row, RowAttention, read_row, read_rows
from psa_core import PSAConfig, TokenLayout
from psa_core.presets import load_presets
from train import export
from wan import WanDecoder, WanSize, WanTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (2, 8, 12)
LAYOUT = TokenLayout(GRID)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks that no one trained, and whose output depends on its attention."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = WanTransformer(WanSize(dim=128, layers=2, ffn_dim=32))
    nn.init.normal_(model.head.head.weight, std=0.3)
    for block in model.blocks:
        nn.init.normal_(block.modulation, std=1.0)
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            nn.init.constant_(norm.weight, 3.0)
    export(model, WanDecoder(2), folder)
    (folder / "train.json").write_text('{"clip_set": "second"}')
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SmallModel:
    return SmallModel.load("tiny", folder, CPU)


def render(folder: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """Records of the program on one short video."""
    arguments = ["--models", f"tiny={folder}", "--cases", "2x8x12:3", "--videos", "1", "--out", str(out), *more]
    whole_video.main(arguments)
    (path,) = out.glob("whole-video-*.json")
    return json.loads(path.read_text())["records"]


def test_the_program_renders_every_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"method": "flash"},
        {"error_weight": [0, 100]},
        {"preset": "wan2.1_1.3b/four_steps"},
        {"method": "sage"},
    ]
    records = render(folder, tmp_path, "--rows", json.dumps(rows))
    out = capsys.readouterr().out
    assert "left out: sage (sageattention is not installed)" in out
    by_method = {record["method"]: record for record in records}
    assert list(by_method) == ["dense", "flash", "flat, error_weight 0", "flat, error_weight 100", "four_steps"]
    for record in records:
        assert (record["model"], record["blocks"], record["heads"], record["tokens"]) == ("tiny", 2, 1, 192)
        assert (record["seed"], record["seeds"], record["subject"]) == (0, "tuning", "rabbit")
        assert record["seconds"] > 0
    dense, floor, exact, sparse, preset = by_method.values()
    assert dense["work"] == floor["work"] == 1
    assert dense["psnr_db"] is None and dense["ssim"] == 1
    assert exact["work"] == 1 and min(exact["psnr_db"], floor["psnr_db"]) > 90  # rounding alone
    assert sparse["work"] < 0.6 and sparse["psnr_db"] < 70 and sparse["ssim"] < 1
    assert preset["settings"] == {"preset": "wan2.1_1.3b/four_steps"} and preset["family"] == "four_steps"

    again = render(folder, tmp_path, "--rows", json.dumps([*rows, {"error_weight": 0.1}]), "--resume")
    assert [record["method"] for record in again][-1] == "flat, error_weight 0.1" and len(again) == 6
    assert [record for record in again if record["method"] == exact["method"]] == [exact]

    render(folder, tmp_path, "--rows", json.dumps(rows), "--seeds", "test", "--seconds", "0")
    assert "5 of 5 videos are left for another call" in capsys.readouterr().out


def test_a_row_that_fails_is_recorded_and_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    rows = ["--rows", '[{"error_weight": 0.1}]', "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.video_methods.psa_attention", broken)
        records = render(folder, tmp_path, *rows)
    assert [record.get("failed") for record in records] == [None, "RuntimeError: no such kernel"]
    records = render(folder, tmp_path, *rows)
    assert [record["method"] for record in records if "failed" not in record] == ["dense", "flat, error_weight 0.1"]
    assert len(records) == 2


@torch.no_grad()
def test_dense_answers_are_the_models_own(model: SmallModel, folder: Path) -> None:
    """And guidance weighs the two conditions of one batch."""
    own = load_model(folder / "wan_demo.safetensors")
    latent, text = model.noise(GRID, 3), model.text("gears", 2.5)
    wanted, empty = own(latent.expand(2, -1, -1, -1, -1), torch.full((2,), 600.0), text).split(1)
    assert wanted.std() > 0.01
    dense = DenseAttention(CPU)
    alone = own(latent, torch.tensor([600.0]), text[:1])
    torch.testing.assert_close(model.velocity(latent, 0.6, model.text("gears", 1), 1, dense), alone)
    torch.testing.assert_close(model.velocity(latent, 0.6, text, 2.5, dense), empty + 2.5 * (wanted - empty))
    assert not torch.equal(model.text("gears", 1), model.text("boats", 1))


def test_likeness_is_that_of_the_pictures() -> None:
    video = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32) * 0.8
    assert whole_video.likeness(video, video) == (math.inf, 1.0)
    psnr, ssim = whole_video.likeness(video, video + np.float32(0.1))
    assert psnr == pytest.approx(20, abs=1e-3) and ssim < 1


def test_the_share_done_is_what_comfyui_makes_the_noise_level_from() -> None:
    for percent in (0.0, 0.2, 0.5, 0.9, 1.0):
        left = 1 - percent
        assert percent_of(3 * left / (1 + 2 * left)) == pytest.approx(percent, abs=1e-12)


def weight(row: Row, percent: float, block: int = 0) -> float | None:
    config = row.settings_for(percent, block, LAYOUT, blocks=4)
    return None if config is None else config.error_weight


@pytest.mark.parametrize("ramp", [0.5, 1.0, 2.0])
def test_a_ramp_begins_nearly_dense_and_ends_at_the_weight(ramp: float) -> None:
    row = read_row({"error_weight": 0.01, "ramp": ramp})
    assert weight(row, 0.0) == pytest.approx(0.01 / 64**ramp)
    assert weight(row, 1 / 128) == pytest.approx(0.01 / 64**ramp)
    assert weight(row, 0.5) == pytest.approx(0.01 * 0.5**ramp)
    assert weight(row, 0.999) == pytest.approx(0.01 * 0.999**ramp)


def test_a_row_says_where_attention_is_sparse() -> None:
    row = read_row({"error_weight": 0.01, "start_percent": 0.2, "dense_blocks": "-1", "block_weights": {"0, 2": 0.3}})
    assert weight(row, 0.1999) is None
    assert weight(row, 0.2 - 1e-9) == pytest.approx(0.003)  # a rounding error below
    assert [weight(row, 0.5, block) for block in range(4)] == [0.003, 0.01, 0.003, None]
    flash = read_row({"method": "flash"})
    assert weight(flash, 0.5) is None
    ranked = read_row({"preset": "wan2.1_1.3b/official_balanced"})
    assert ranked.settings_for(0.5, 0, LAYOUT, 4) == ranked.config and ranked.schedule.min_tokens == 0


def test_a_preset_is_as_in_its_file() -> None:
    (balanced,) = read_rows([{"preset": "wan2.1_1.3b/balanced", "error_weight": 0.02}])
    preset = load_presets(whole_video.ROOT / "presets" / "wan2.1_1.3b.yaml")["balanced"]
    assert isinstance(balanced, Row)
    assert balanced.schedule.start_percent == preset.schedule.start_percent
    assert balanced.config == PSAConfig(**{**vars(preset.config), "error_weight": 0.02})
    assert balanced.name == "balanced, error_weight 0.02" and balanced.family == "balanced"


def test_lists_stand_for_a_row_each() -> None:
    data = [{"error_weight": [0.1, 0.2], "ramp": [0, 1]}, {"preset": "wan2.1_1.3b/*"}]
    rows = [row for row in read_rows(data) if isinstance(row, Row)]
    assert [row.name for row in rows[:4]] == [
        "ramp 0, error_weight 0.1", "ramp 1, error_weight 0.1", "ramp 0, error_weight 0.2", "ramp 1, error_weight 0.2",
    ]  # fmt: skip
    assert {row.family for row in rows[:4]} == {"ramp 0", "ramp 1"}
    assert [row.name for row in rows[4:]] == list(load_presets(whole_video.ROOT / "presets" / "wan2.1_1.3b.yaml"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"error_weight": 0.1, "rampe": 1}, "unknown rampe"),
        ({"method": "sola"}, "method 'sola' is not one of psa, flash, sol_attn, sage"),
        ({"preset": "wan2.1_1.3b/best"}, "preset 'best' is not one of wan2.1_1.3b's: balanced, "),
        ({"error_weight": -1}, "error_weight: -1 is not a number from 0"),
    ],
)
def test_a_row_that_says_nothing_is_refused(
    row: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        render(folder, tmp_path, "--rows", json.dumps([row]))
    assert message in capsys.readouterr().err


def test_the_usual_rows_can_be_read() -> None:
    rows = list(read_rows(json.loads(whole_video.ROWS.read_text())))
    names = [row.name if isinstance(row, Row) else row[0] for row in rows]
    assert "balanced" in names and "ramp, error_weight 0.003" in names
    assert len({row.name for row in rows if isinstance(row, Row)}) == sum(isinstance(row, Row) for row in rows)


def test_work_is_the_mean_over_dense_and_sparse_calls() -> None:
    row = read_row({"error_weight": 1e6, "start_percent": 0.5})
    attend = RowAttention(row, LAYOUT, 1, CPU)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 64).unbind()
    torch.testing.assert_close(attend(q, k, v, 0), DenseAttention(CPU)(q, k, v, 0))
    assert attend.work() == 1
    attend.percent = 0.5
    attend(q, k, v, 0)
    density = 1 / 64  # every block in one token
    assert attend.work() == pytest.approx((1 + density) / 2, rel=1e-4)


def test_what_a_curve_says_between_its_points() -> None:
    def record(work: float | None, psnr: float | None, family: str = "a", seed: int = 0) -> dict[str, Any]:
        about = {"model": "tiny", "tokens": 192, "steps": 3, "seeds": "test", "ssim": 0.9, "seconds": 1.0}
        return about | {"family": family, "method": f"{family} {work}", "work": work, "psnr_db": psnr, "seed": seed}

    records = [record(0.4, 40), record(0.1, 20), record(0.2, 30), record(0.3, 25)]
    records += [record(0.4, 44, seed=1), record(0.1, 20, seed=1), record(0.2, 30, seed=1), record(0.3, 25, seed=1)]
    records += [record(None, 31, "sol", seed) for seed in (0, 1)]
    records += [record(0.15, 50, "half"), record(1, None, "dense"), record(0.05, 9) | {"seeds": "tuning"}]
    records += [{"failed": "no"}]
    (case,) = trade_off.cases_of(records, "test").values()
    points = trade_off.points_of(case)
    assert {point.method for point in points} == {"a 0.4", "a 0.1", "a 0.2", "a 0.3", "sol None"}  # half lacks a seed
    rising = trade_off.curve(points, "a")
    assert rising == [(0.1, 20), (0.2, 30), (0.4, 42)]  # more work at .3 brought nothing
    assert trade_off.work_at(rising, 25) == pytest.approx(0.1 * 2**0.5)
    assert trade_off.psnr_at(rising, 0.1 * 2**0.5) == pytest.approx(25)
    assert trade_off.work_at(rising, 42) == pytest.approx(0.4) and trade_off.psnr_at(rising, 0.1) == 20
    assert trade_off.work_at(rising, 50) is None and trade_off.psnr_at(rising, 0.05) is None
    assert trade_off.curve(points, "sol") == []

"""Pictures of made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed; `make test` installs it")
pytest.importorskip("adjustText", reason="adjustText is not installed; `make test` installs it")

from benchmarks import plot


def record(method: str, ms: float, error: float | None, preset: str = "", **more: object) -> dict[str, object]:
    common = {"case": "wan2.1_14b_720p_81f", "input": "structured", "tokens": 75600, "heads": 40, "head_dim": 128}
    return common | {"method": method, "preset": preset, "ms": ms, "rel_l2": error, "stages_ms": {}} | more


@pytest.fixture
def results(tmp_path: Path) -> Path:
    stages = {"prepare": 3.0, "importance": 2.0, "select": 1.0, "attend": 40.0}
    attention = [
        record("cudnn", 198.0, 0.0017),
        record("psa", 21.0, 0.04, "balanced", stages_ms=stages),
        record("psa", 45.0, 0.02, "density 0.15", stages_ms=stages),
        record("psa", 60.0, 0.03, "worse"),
        record("psa", 30.0, None, "balanced") | {"input": "random"},
        {"case": "wan2.1_14b_720p_81f", "input": "structured", "method": "sage", "preset": "", "failed": "no"},
    ]
    run = {"model": "wan2.1_14b", "preset": "", "method": "dense", "density": 1.0, "seconds_per_step": 30.0}
    run |= {"vram": "normal"}
    sampling = [run, run | {"method": "psa", "preset": "density 0.15", "density": 0.15, "seconds_per_step": 12.0}]
    sampling += [run | {"vram": "novram", "seconds_per_step": 45.0}]
    video = {"model": "first", "tokens": 4992, "steps": 30, "seed": 5, "seeds": "test", "ssim": 0.9, "seconds": 2.0}
    videos = [
        video | {"family": family, "method": method, "work": work, "psnr_db": psnr}
        for family, method, work, psnr in (
            ("dense", "dense", 1.0, None), ("flash", "flash", 1.0, 67.0), ("balanced", "balanced", 0.34, 32.0),
            ("ramp", "ramp, error_weight 0.001", 0.3, 34.0), ("ramp", "ramp, error_weight 0.01", 0.15, 28.0),
            ("Sol-Attn", "Sol-Attn, tau 1", None, 25.0), ("Sol-Attn", "Sol-Attn, tau 2", None, 22.0),
        )
    ]  # fmt: skip
    videos += [record | {"steps": 4} for record in videos]
    for kind, records in (("attention", attention), ("sampling", sampling), ("whole-video", videos)):
        (tmp_path / f"{kind}-a-gpu.json").write_text(json.dumps({"records": records}))
    return tmp_path


def test_the_front_is_what_nothing_beats() -> None:
    records = [record("psa", ms, error) for ms, error in ((3, 0.1), (1, 0.3), (2, 0.3), (4, 0.2), (5, 0.05))]
    assert [(r["ms"], r["rel_l2"]) for r in plot.pareto_front(records)] == [(1, 0.3), (3, 0.1), (5, 0.05)]


def test_every_picture_is_drawn_for_both_pages(results: Path, tmp_path: Path) -> None:
    """With its text in the SVG's own shapes, the same bytes for the same results."""
    plot.main(["--results", str(results), "--out", str(tmp_path / "first")])
    names = {path.name for path in (tmp_path / "first").iterdir()}
    kinds = ("pareto", "pareto-all", "tokens", "stages", "sampling", "videos", "videos-all")
    assert names == {f"{kind}-{theme}.svg" for kind in kinds for theme in ("light", "dark")}
    plot.main(["--results", str(results), "--out", str(tmp_path / "second")])
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_steps_with_spared_memory_are_another_matter(results: Path) -> None:
    records = json.loads((results / "sampling-a-gpu.json").read_text())["records"]
    axis, *others = plot.draw_sampling(records, plot.THEMES[0]).axes
    assert [bar.get_width() for bar in axis.patches] == [30.0, 12.0]
    assert not others


def test_videos_are_drawn_where_their_work_and_time_are(results: Path) -> None:
    records = json.loads((results / "whole-video-a-gpu.json").read_text())["records"]
    cases = plot.cases_of(records, "test")
    work, seconds = plot.draw_videos(plot.main_case(cases), plot.THEMES[0]).axes  # of the 30 steps alone
    assert "4992 tokens, 30 steps" in work.get_title() and "67 dB" in work.get_title()
    drawn = [tuple(zip(*line.get_data(), strict=True)) for line in work.lines]
    assert drawn == [((0.34, 32.0),), ((0.15, 28.0), (0.3, 34.0))]  # Sol-Attn does not tell its work
    assert len(seconds.lines) == 4  # dense as an upright line
    assert len(plot.draw_videos(cases, plot.THEMES[1]).axes) == 4


def test_a_device_without_results_is_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot.main(["--results", str(results), "--device", "b-gpu"])
    assert "'b-gpu' has no results" in capsys.readouterr().err
    (results / "attention-b-gpu.json").write_text('{"records": []}')
    with pytest.raises(SystemExit):
        plot.main(["--results", str(results)])
    assert "there are a-gpu, b-gpu" in capsys.readouterr().err

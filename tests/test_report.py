"""PSA Report: what a run's calls add up to, its picture in both themes, and the node on a small Wan model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_wan import BLOCKS, make_model, sample

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"start_percent": 0.5, "min_tokens": 0, "backend": "reference", "error_weight": 1.0}


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


@pytest.fixture
def report(comfyui: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Runs the node; its preview goes to a temporary folder."""
    import folder_paths
    from psa_pack.nodes.report import PSAReport

    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path))
    yield PSAReport.execute
    folder_paths.set_temp_directory(before)


def patch(model: Any, preset: str = "balanced", **inputs: Any) -> Any:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    return PSAAttentionPatch.execute(model, preset, **SPARSE | inputs).args[0]


def call(step: int, block: int, density: float | None, seconds: float = 0.01, **changes: Any) -> Any:
    from psa_pack.nodes.run_record import CallRecord

    pairs = () if density is None else (round(100 * density), 100 - round(100 * density))
    values = {"step": step, "block": block, "tokens": 96, "batch": 2, "seconds": seconds, "density": density}
    return CallRecord(**values | {"level_pairs": pairs} | changes)


def run_of(calls: list[Any], **changes: Any) -> Any:
    from psa_pack.nodes.run_record import RunRecord
    from psa_pack.nodes.words import Words

    sparse = [entry.density for entry in calls if entry.density is not None]
    values: dict[str, Any] = {
        "title": "wan2.1_14b balanced",
        "outcome": "finished",
        "seconds": 12.5,
        "steps": 1 + max((entry.step for entry in calls), default=-1),
        "sparse_steps": len({entry.step for entry in calls if entry.density is not None}),
        "sparse_calls": len(sparse),
        "dense_calls": {Words.of("dense_block"): len(calls) - len(sparse)} if len(sparse) < len(calls) else {},
        "dense_attention": "",
        "other_calls": 0,
        "density": float(np.mean(sparse)) if sparse else None,
        "tokens": 96,
        "backend": "triton" if sparse else "",
        "unused_cause": None,
        "levels": (1, "block"),
        "calls": tuple(calls),
    }
    values |= changes
    values["dense_calls"] = {sentence(reason): count for reason, count in values["dense_calls"].items()}
    return RunRecord(**values)


def sentence(text: Any) -> Any:
    """A text as a sentence of its own; a sentence as it is."""
    from psa_pack.nodes.words import Words

    return Words.of("said", text=text) if isinstance(text, str) else text


def grid(blocks: int, steps: int, dense_steps: int, seconds: float = 0.01) -> list[Any]:
    return [
        call(step, block, None if step < dense_steps else (1 + block) / (blocks + 1), seconds)
        for step in range(steps)
        for block in range(blocks)
    ]


# What it adds up to


def test_calls_of_one_step_and_block_are_merged(comfyui: Path) -> None:
    from psa_pack.nodes.run_facts import RunFacts

    calls = [call(0, 0, None), call(0, 1, None), call(1, 0, 0.2), call(1, 0, 0.4), call(1, 1, 0.5), call(1, 1, None)]
    facts = RunFacts.of(run_of(calls, steps=3))
    nan = float("nan")
    np.testing.assert_allclose(facts.density, [[1, 0.3, nan], [1, 0.75, nan]])
    assert facts.dense.tolist() == [[True, False, False], [True, False, False]]
    # Step 1: three sparse calls with .2, .4 and .5 of their pairs at level 1, and a dense one.
    np.testing.assert_allclose(facts.shares, [[0, 0, 1], [1.1 / 4, 1.9 / 4, 1 / 4], [0, 0, 0]])
    np.testing.assert_allclose(facts.level_shares, [1.1 / 3, 1.9 / 3])


def test_the_dense_estimate_takes_calls_of_the_same_size(comfyui: Path) -> None:
    from psa_pack.nodes.run_facts import RunFacts

    dense = [call(0, block, None, seconds) for block, seconds in enumerate((0.05, 0.06, 0.9))]
    short = [call(0, 0, None, 0.01, tokens=48), call(0, 0, None, 0.02, batch=1)]
    sparse = [call(1, 0, 0.1, 0.02), call(1, 1, 0.1, 0.02), call(1, 2, 0.1, 0.01, batch=1)]
    facts = RunFacts.of(run_of([*dense, *short, *sparse]))
    assert facts.estimate == pytest.approx(2 * 0.06 + 0.02)
    assert (facts.sparse_seconds, facts.dense_seconds) == pytest.approx((0.05, 1.04))
    # One call of another size, and there is no estimate at all.
    facts = RunFacts.of(run_of([*dense, *sparse]))
    assert (facts.estimate, facts.unmatched) == (None, 1)
    facts = RunFacts.of(run_of(dense))
    assert (facts.estimate, facts.unmatched) == (None, 0)


def test_text_tells_the_same(comfyui: Path) -> None:
    from psa_pack.nodes.report import report_lines
    from psa_pack.nodes.run_facts import RunFacts

    run = run_of([call(0, 0, None, 0.3), call(0, 1, None, 0.3), call(1, 0, 0.2, 0.1), call(1, 1, 0.4, 0.1)])
    assert list(map(str, report_lines(run, RunFacts.of(run)))) == [
        "PSA wan2.1_14b balanced",
        "attention 3.0x faster",
        "1 of 2 steps sparse",
        "mean density 0.30 (triton)",
        "96 tokens",
        "sparse calls: 2, dense: 2",
        "dense: 2 in dense_blocks",
        "block pairs at level 1: 30.0%",
        "block pairs at level block: 70.0%",
        "in sparse calls: 0.20 s",
        "in dense calls: 0.60 s",
        "the sparse calls if dense, estimated: 0.60 s",
        "finished after 12.5 s",
    ]
    run = run_of(grid(2, 3, 0))
    assert "the sparse calls if dense: no estimate, as no dense call like 6 of them was timed" in map(
        str, report_lines(run, RunFacts.of(run))
    )


def test_every_line_of_the_text_has_its_chinese(comfyui: Path) -> None:
    from psa_pack.nodes.report import _NO_RUN, _UNPATCHED, report_lines
    from psa_pack.nodes.run_facts import RunFacts

    lines = [*_NO_RUN, *_UNPATCHED]
    varying = run_of([call(step, 0, 0.2, error_weight=0.001 * (step + 1)) for step in range(3)])
    for run in (run_of(grid(2, 4, 2)), run_of(grid(2, 3, 0)), varying):
        lines += report_lines(run, RunFacts.of(run))
    assert len(lines) > 20
    for line in lines:
        assert line.say("zh") != line.say("en") or line.key == "title", line


def test_the_history_holds_the_run_as_numbers(model: Any, report: Callable[..., Any]) -> None:
    """What a program that queued the workflow reads, as the demo does."""
    patched = patch(model)
    out = report({"samples": sample(patched)}, patched)
    (run,) = json.loads(json.dumps(out.ui["psa_run"]))
    wanted = {"outcome": "finished", "steps": 4, "sparse_steps": 2, "sparse_calls": 4, "backend": "reference"}
    assert run.items() >= wanted.items()
    assert run["dense_calls"] == {"before start_percent 0.5": 4}
    assert 0 < run["density"] < 1
    assert report({}, model).ui["psa_run"] == []


# The picture

RUNS: dict[str, Callable[[], Any]] = {
    "small": lambda: run_of(grid(3, 20, 6)),
    "large": lambda: run_of(grid(40, 50, 10)),
    "all dense": lambda: run_of(grid(30, 20, 20)),
    "no dense": lambda: run_of(grid(30, 4, 0)),
    "one call": lambda: run_of(grid(1, 1, 0)),
    "thousands of calls": lambda: run_of(grid(12, 1500, 300)),
    "steps without a call": lambda: run_of([call(0, 0, None), call(5, 1, 0.2)], steps=9),
    "many reasons": lambda: run_of(
        grid(3, 4, 1), dense_calls={f"reason {i} " + "very long " * 40: i for i in range(9)}
    ),
    "failed": lambda: run_of([], outcome="failed", steps=4, sparse_calls=9, dense_calls={"in dense_blocks": 3}),
    "failed at once": lambda: run_of([], outcome="failed", unused_cause=sentence("the model was not called")),
    "interrupted": lambda: run_of(grid(3, 4, 1), outcome="interrupted"),
    "weights that vary": lambda: run_of([call(step, 0, 0.2, error_weight=1e-5 * (step + 1)) for step in range(50)]),
    "other letters": lambda: run_of(grid(2, 2, 1), dense_calls={"because PSA could not run (内存不足)": 2}),
    "a long word": lambda: run_of(grid(2, 2, 1), dense_calls={"x" * 300: 1, "y" * 5000: 1}),
    "no time": lambda: run_of(grid(2, 2, 1, seconds=0.0)),
}


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_picture(comfyui: Path, name: str, theme: str) -> None:
    from psa_pack.nodes.report_picture import THEMES, WIDTH, draw_run
    from psa_pack.nodes.run_facts import RunFacts

    run = RUNS[name]()
    picture = np.asarray(draw_run(run, RunFacts.of(run), "a note", theme))
    height, width, channels = picture.shape
    assert (width, channels) == (WIDTH, 3) and 150 < height < 2200
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == THEMES[theme].background).all()  # nothing is cut off
    assert (picture == THEMES[theme].text).all(axis=2).sum() > 200


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_heat_map_shows_steps_and_blocks(comfyui: Path, theme: str) -> None:
    """Three blocks, four steps, the first of them dense; block 2 is densest."""
    from psa_pack.nodes import report_picture as drawing
    from psa_pack.nodes.run_facts import RunFacts

    run = run_of(grid(3, 4, 1))
    picture = np.asarray(drawing.draw_run(run, RunFacts.of(run), "", theme))
    colors = drawing.THEMES[theme]
    cell = (drawing._PLOT_RIGHT - drawing._PLOT_LEFT) // 4
    is_dense = (picture[:, drawing._PLOT_LEFT + cell // 2] == colors.dense).all(axis=1)
    top = int(np.flatnonzero(is_dense)[0])
    for step in range(4):
        for block in range(3):
            x = drawing._PLOT_LEFT + round((step + 0.5) * cell)
            y = top + round((block + 0.5) * drawing._ROW_HEIGHT)
            expected = colors.dense if step == 0 else colors.density(np.array((1 + block) / 4))
            assert (picture[y, x] == expected).all(), (step, block)


def test_the_bars_are_as_long_as_the_seconds(comfyui: Path) -> None:
    from psa_pack.nodes import report_picture as drawing
    from psa_pack.nodes.run_facts import RunFacts

    run = run_of([call(0, 0, None, 3.0), call(1, 0, 0.2, 1.0), call(2, 0, 0.2, 1.0)])
    picture = np.asarray(drawing.draw_run(run, RunFacts.of(run), "", "light"))
    colors = drawing.THEMES["light"]
    lengths = {
        (int((row == colors.ramp[1]).all(axis=1).sum()), int((row == colors.dense).all(axis=1).sum()))
        for row in picture
    }
    measured, estimate = max(pair for pair in lengths if pair[0]), max(pair for pair in lengths if not pair[0])
    # 2 s sparse and 3 s dense, against 9 s dense.
    assert measured[0] / estimate[1] == pytest.approx(2 / 9, abs=0.01)
    assert measured[1] / estimate[1] == pytest.approx(3 / 9, abs=0.01)


# The node


def test_the_latent_passes_and_the_run_is_told(model: Any, report: Callable[..., Any]) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patched = patch(model, dense_blocks="0")
    samples = {"samples": sample(patched), "noise_mask": None}
    later = ModelSamplingSD3().patch(patched, 5.0)[0]  # a clone
    for theme in ("dark", "light"):
        out = report(samples, later, theme)
        passed, picture, text = out.args
        assert passed is samples
        assert picture.shape[0] == 1 and picture.shape[2:] == (1024, 3)
        assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
        assert (picture.mean() < 0.5) == (theme == "dark")
        assert "2 of 4 steps sparse\n" in text and f"sparse calls: 2, dense: {4 * BLOCKS - 2}\n" in text
        assert "dense: 4 before start_percent 0.5\ndense: 2 in dense_blocks\n" in text
        (shown,) = out.ui["images"]
        assert shown["type"] == "temp"


def test_both_conditions_and_one_after_the_other(model: Any, report: Callable[..., Any]) -> None:
    patched = patch(model)
    for negative_context, calls in ((77, 4), (100, 8)):
        latent = {"samples": sample(patched, cfg=6.0, negative_context=negative_context)}
        text = report(latent, patched).args[2]
        assert f"sparse calls: {calls}, dense: {calls}\n" in text
        assert "the sparse calls if dense, estimated: " in text


def test_the_latest_run_of_a_model_is_told(model: Any, report: Callable[..., Any]) -> None:
    """Two parts of one schedule on one model; another patched model keeps its own."""
    patched, other = patch(model), patch(model, "fast")
    first = {"samples": sample(patched, steps=10, last_step=6)}
    assert "\n1 of 6 steps sparse\n" in report(first, patched).args[2]
    second = {"samples": sample(patched, steps=10, start_step=6)}
    assert "\n4 of 4 steps sparse\n" in report(second, patched).args[2]
    assert "\n4 of 4 steps sparse\n" in report(first, patched).args[2]
    assert report(first, other).args[2].startswith("No run yet\n")


def test_no_run_and_no_patch_give_a_picture_that_says_so(model: Any, report: Callable[..., Any]) -> None:
    samples = {"samples": torch.zeros(1, 16, 1, 2, 2)}
    for unrun, said in ((patch(model), "No run yet\n"), (model, "PSA is not on this model\n")):
        passed, picture, text = report(samples, unrun).args
        assert passed is samples and text.startswith(said)
        assert picture.shape[2] == 1024 and picture.std() > 0
    assert report(samples, patch(patch(model), "off")).args[2].startswith("PSA is not on this model\n")


def test_a_run_that_failed_is_told(model: Any, report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    patched = patch(model)
    with monkeypatch.context() as broken:
        broken.setattr(session, "psa_attention", lambda *args, **kwargs: 1 / 0)
        sample(patched)
    text = report({}, patched).args[2]
    assert "dense: 4 because PSA could not run (ZeroDivisionError: division by zero)\n" in text
    source = model.clone()
    source.model_options["transformer_options"]["optimized_attention_override"] = lambda *args, **kwargs: 1 / 0
    patched = patch(source)
    with pytest.raises(ZeroDivisionError):
        sample(patched)
    assert "\nsparse calls: 0, dense: 1\n" in (text := report({}, patched).args[2])
    assert text.split("\n")[-1].startswith("failed after ")


def test_an_unknown_theme_is_refused(model: Any, report: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="theme: 'blue' is not one of dark, light"):
        report({}, model, "blue")


# What it costs


def test_recording_and_drawing_cost_next_to_nothing(comfyui: Path) -> None:
    """Under 0.5 % of the fastest measured step, Wan 2.1 1.3B in 0.49 s; what other processes take does not count."""
    from psa_pack.nodes.report_picture import draw_run
    from psa_pack.nodes.run_facts import RunFacts
    from psa_pack.nodes.tally import PendingCall, Stopwatch, read_calls
    from psa_pack.psa_core.attention import PSAStats

    steps, blocks, step_seconds = 50, 30, 0.49
    stats = PSAStats(torch.rand(2, 12), torch.ones(2, 12, 5, dtype=torch.int64))

    def record() -> list[Any]:
        pending = []
        for block in range(blocks):
            watch = Stopwatch(torch.device("cpu"))
            watch.stop()
            pending.append(PendingCall(0, block, 32760, 2, watch, stats))
        return read_calls(pending)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            begin = time.thread_time()
            work()
            times.append(time.thread_time() - begin)
        return min(times)

    run = run_of(grid(blocks, steps, 10))
    drawing = best(lambda: draw_run(run, RunFacts.of(run), "", "dark"))
    assert best(record) + drawing / steps < 0.005 * step_seconds

"""The error weight over the sampling and the blocks, on a small Wan model sampled by a real ComfyUI."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from psa_pack.psa_core import TokenLayout
from psa_pack.psa_core.config import PSAConfig
from psa_pack.psa_core.presets import Preset
from psa_pack.psa_core.schedule import BlockWeights, Schedule

from runs import reasons, record
from tiny_wan import BLOCKS, LATENT, make_model, sample

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT = 0.5
SHIFT = 8.0  # ComfyUI's for Wan
LAYOUT = TokenLayout((1, 4, 5))


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


def preset(weight: float = WEIGHT, expected_work: float | None = None, **schedule: Any) -> Preset:
    if "block_weights" in schedule:
        schedule["block_weights"] = BlockWeights.parse(schedule["block_weights"])
    return Preset("mine", "own", "", "", PSAConfig(error_weight=weight), Schedule(**schedule), expected_work)


def patch(model: Any, preset: Preset, **inputs: Any) -> Any:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    return PSAAttentionPatch.execute(model, "balanced", custom_preset=preset, backend="reference", **inputs).args[0]


def gate_of(preset: Preset) -> Any:
    from psa_pack.nodes.gate import Gate, PatchSettings

    settings = PatchSettings("own mine", (), preset, frozenset(), "reference", False, (("double", BLOCKS),))
    return Gate(settings, lambda percent: 1 - percent)


def weights(patched: Any) -> list[float]:
    """The error weight of each step of the latest run."""
    by_step = record(patched).weights_by_step
    assert all(least == largest for least, largest in by_step.values())
    return [least for least, _ in by_step.values()]


def ramp(*percents: float) -> Any:
    return pytest.approx([WEIGHT * max(percent, 1 / 64) for percent in percents], rel=1e-4)


TENTHS = [step / 10 for step in range(10)]


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_ramp_counts_in_the_running_models_sigmas(model: Any, shift: float | None) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patched = patch(model, preset(ramp=1))
    if shift is not None:  # a node after the patch
        patched = ModelSamplingSD3().patch(patched, shift)[0]
    sample(patched, steps=10, cfg=1.0)
    assert weights(patched) == ramp(*TENTHS)


def test_a_window_does_not_move_the_ramp(model: Any) -> None:
    patched = patch(model, preset(ramp=1, start_percent=0.3, end_percent=0.8))
    sample(patched, steps=10, cfg=1.0)
    assert weights(patched) == ramp(0.3, 0.4, 0.5, 0.6, 0.7)


def test_split_samplers_share_one_ramp(model: Any) -> None:
    patched, found = patch(model, preset(ramp=1)), []
    for start, last in ((0, 3), (3, 10)):
        sample(patched, steps=10, cfg=1.0, start_step=start, last_step=last)
        found += weights(patched)
    assert found == ramp(*TENTHS)


def test_two_experts_share_one_ramp(model: Any) -> None:
    """As Wan 2.2's, which have a patch each."""
    high, low = patch(model, preset(ramp=1)), patch(make_model(), preset(ramp=1))
    sample(high, steps=10, cfg=1.0, last_step=5)
    sample(low, steps=10, cfg=1.0, start_step=5)
    assert weights(high) + weights(low) == ramp(*TENTHS)


def test_with_less_denoise_the_ramp_begins_where_the_noise_does(model: Any) -> None:
    from nodes import KSampler

    patched = patch(model, preset(ramp=1))
    text = [[torch.randn(1, 77, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    latent = {"samples": torch.zeros(1, 16, *LATENT)}
    KSampler().sample(patched, 2, 4, 1.0, "euler", "simple", text, text, latent, denoise=0.5)
    assert weights(patched) == ramp(0.5, 0.625, 0.75, 0.875)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_sde"])
def test_a_sampler_that_calls_several_times_a_step_gets_the_weight_of_each_sigma(
    model: Any, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psa_pack.nodes.gate import Gate

    from nodes import KSampler

    seen: list[tuple[float, float]] = []
    admit = Gate.admit

    def watched(self: Any, sigma: float, tokens: int, block: int | None) -> Any:
        config = admit(self, sigma, tokens, block)
        seen.append((sigma, config.error_weight))
        return config

    monkeypatch.setattr(Gate, "admit", watched)
    text = [[torch.randn(1, 77, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    latent = {"samples": torch.zeros(1, 16, *LATENT)}
    KSampler().sample(patch(model, preset(ramp=1)), 2, 4, 1.0, sampler, "simple", text, text, latent)
    for sigma, weight in seen:
        done = 1 - sigma / (SHIFT - (SHIFT - 1) * sigma)
        assert weight == pytest.approx(WEIGHT * max(done, 1 / 64), rel=1e-3, abs=1e-6)
    assert len({sigma for sigma, _ in seen}) >= (7 if sampler.startswith("dpm") else 4)


def test_block_weights_reach_their_blocks(model: Any) -> None:
    patched = patch(model, preset(weight=1.0, block_weights={"0": 0, "-1": 0.5}))
    sample(patched)
    found = {(call.block, call.error_weight) for call in record(patched).calls}
    assert found == {(0, 0.0), (1, 0.5)}
    exact, pooled = ([call.density for call in record(patched).calls if call.block == block] for block in (0, 1))
    assert set(exact) == {1.0} and max(pooled) < 1


def test_a_weight_of_zero_is_exact_whatever_it_is_multiplied_by(model: Any) -> None:
    patched = patch(model, preset(weight=0.0, ramp=1, block_weights={"0": 3}))
    out, dense = sample(patched), sample(model)
    assert record(patched).density == 1.0
    assert (out - dense).norm() / dense.norm() < 1e-5


def test_one_self_check_serves_all_weights(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    asked: list[Any] = []
    monkeypatch.setattr(session, "self_check", lambda *args: asked.append(args))
    patched = patch(model, preset(ramp=1, block_weights={"0": 0.3}))
    sample(patched, steps=10)
    assert len(record(patched).weights_by_step) == 10 and len(asked) == 1


def test_equal_weights_share_one_config(comfyui: Path) -> None:
    gate = gate_of(preset(ramp=1, block_weights={"0": 0.3}))
    first, other, again = (gate.admit(sigma, 9, 1) for sigma in (0.5, 0.25, 0.5))
    assert first is again and first is not other and gate.admit(0.5, 9, 0) is not first
    assert (first.error_weight, other.error_weight) == (pytest.approx(0.25), pytest.approx(0.375))
    flat = preset()
    assert gate_of(flat).admit(0.5, 9, None) is flat.config
    largest = gate_of(preset(weight=1e6, block_weights={"0": 10})).admit(0.5, 9, 0)
    assert largest.error_weight == 1e6


def test_a_block_without_a_name_stays_dense_where_blocks_have_weights(comfyui: Path) -> None:
    reason = gate_of(preset(block_weights={"0": 0.3})).admit(0.5, 9, None)
    assert str(reason) == "in a block that ComfyUI does not name, while dense_blocks or block_weights is set"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"2": 0.3}, "block_weights: 2 is not a block of this model, which has 2"),
        ({"vace: 0": 0.3}, "block_weights: 'vace' is not a stack of this model, which has double"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_before_any_sampling(
    model: Any, named: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        patch(model, preset(block_weights=named))
    assert str(error.value).startswith(message)


def test_a_weight_that_varies_is_told(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    from psa_pack.nodes.report import report_lines
    from psa_pack.nodes.run_facts import RunFacts

    caplog.set_level(logging.INFO, logger="psa_pack")
    patched = patch(model, preset(weight=0.4, ramp=1, block_weights={"0": 0.5}))
    sample(patched, cfg=1.0)
    run = record(patched)
    assert "error_weight 0.0031 to 0.3" in map(str, run.summary())
    assert ", error_weight 0.0031 to 0.3;" in caplog.text
    (line,) = (line for line in report_lines(run, RunFacts.of(run)) if line.key == "weights_by_step")
    steps = "1: 0.0031 to 0.0063, 2: 0.05 to 0.1, 3: 0.1 to 0.2, 4: 0.15 to 0.3"
    assert str(line) == f"error_weight by step: {steps}"
    assert line.say("zh").startswith("各步的 error_weight：1：0.0031 到 0.0063，2：")
    assert json.loads(json.dumps(run.as_json()))["error_weights"] == pytest.approx([0.2 / 64, 0.3])


def test_of_one_weight_nothing_is_told(model: Any) -> None:
    patched = patch(model, preset())
    sample(patched)
    assert record(patched).weights == (WEIGHT, WEIGHT)
    assert not record(patched).range_of_weights() and not record(patched).weights_of_steps()
    config = PSAConfig(selection="topk", levels=(1, "skip"), ranges=((0.0, 0.5), (0.5, 1.0)))
    ranked = patch(model, Preset("mine", "own", "", "", config, Schedule()))
    sample(ranked)
    assert record(ranked).weights is None and record(ranked).sparse_calls


def test_a_dense_step_has_no_weight(model: Any) -> None:
    patched = patch(model, preset(ramp=1, start_percent=0.5))
    sample(patched)
    assert list(record(patched).weights_by_step) == [2, 3]
    assert reasons(record(patched)) == {"before start_percent 0.5": 2 * BLOCKS}
    assert {call.error_weight for call in record(patched).calls if call.density is None} == {None}


def test_before_it_runs_the_node_says_what_it_expects(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    sent: list[str] = []
    server = SimpleNamespace(instance=SimpleNamespace(send_progress_text=lambda text, node: sent.append(text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=server))
    node = type("WithHidden", (PSAAttentionPatch,), {"hidden": SimpleNamespace(unique_id="7")})
    measured = preset(expected_work=0.2)
    for given, inputs in (
        (measured, {}),
        (measured, {"error_weight": 0.1}),
        (dataclasses.replace(measured, expected_work=None), {}),
    ):
        node.execute(model, "balanced", custom_preset=given, **inputs)
    said = [text.replace("\n", " ") for text in sent]
    assert said == ["PSA own mine expects about 20% of the attention work", "PSA own mine", "PSA own mine"]

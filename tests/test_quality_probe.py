"""PSA Quality Probe on a small Wan model, sampled by a real ComfyUI: what it measures, suggests and leaves behind."""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from psa_pack.psa_core import psa_attention
from psa_pack.psa_core.config import PSAConfig
from psa_pack.psa_core.presets import Preset, dump_preset, parse_presets
from psa_pack.psa_core.schedule import BlockList, Schedule
from torch import Tensor

from runs import record
from tiny_wan import LATENT, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 4
STEPS = 4
SPARSE = {"start_percent": 0.0, "min_tokens": 0, "backend": "reference", "error_weight": 0.3}
OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model(num_layers=BLOCKS)


@pytest.fixture
def probes(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every probe that a node makes, as a weak reference."""
    from psa_pack.nodes import quality_probe

    made: list[Any] = []
    keep = quality_probe.Probe

    class Remembered(keep):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(quality_probe, "Probe", Remembered)
    return made


def patch(model: Any, preset: str = "balanced", **inputs: Any) -> Any:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    return PSAAttentionPatch.execute(model, preset, **inputs).args[0]


def arguments(sampler: str = "euler", steps: int = STEPS, cfg: float = 6.0) -> dict[str, Any]:
    """Inputs of KSampler but for the model."""
    generator = torch.Generator().manual_seed(1)
    positive, negative = ([[torch.randn(1, 77, 4096, generator=generator), {}]] for _ in range(2))
    return {
        "seed": 2,
        "steps": steps,
        "cfg": cfg,
        "sampler_name": sampler,
        "scheduler": "simple",
        "positive": positive,
        "negative": negative,
        "latent_image": {"samples": torch.zeros(1, 16, *LATENT)},
        "denoise": 1.0,
    }


def probe(
    patched: Any, share: float = 1.0, wanted: float = 0.1, advanced: dict[str, Any] | None = None, **changes: Any
) -> tuple[Tensor, str, Preset]:
    from psa_pack.nodes.quality_probe import PSAQualityProbe

    given = arguments(**changes)
    out = PSAQualityProbe.execute(patched, **given, share=share, wanted_error=wanted, **(advanced or {}))
    latent, report, preset = out.args
    return latent["samples"], report, preset


def ksample(patched: Any, **changes: Any) -> Tensor:
    from nodes import KSampler

    out: Tensor = KSampler().sample(patched, **arguments(**changes))[0]["samples"]
    return out


def running_error(report: str) -> float:
    return float(re.search(r"This run .*had an error of ([\d.]+)", report)[1])  # type: ignore[index]


def override(model: Any, function: Any) -> Any:
    """The model with another node's attention override."""
    changed = model.clone()
    changed.model_options["transformer_options"][OVERRIDE] = function
    return changed


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def test_the_errors_are_those_of_the_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import quality_probe
    from psa_pack.nodes.session import Session

    seen, made = [], []
    attend = Session.attend

    def recorded(
        self: Any, q: Tensor, k: Tensor, v: Tensor, layout: Any, config: Any, scale: Any, block: int, dense: Any
    ) -> Any:
        out = attend(self, q, k, v, layout, config, scale, block, dense)
        weight = config.error_weight
        seen.append((self._tally.step.number, block, q.clone(), k.clone(), v.clone(), layout, out.clone(), weight))
        return out

    class Kept(quality_probe.Probe):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(Session, "attend", recorded)
    monkeypatch.setattr(quality_probe, "Probe", Kept)
    probe(patch(model, **SPARSE), steps=2)
    (measured,) = made
    assert [(call.step, call.block) for call in measured.calls] == [(step, block) for step, block, *_ in seen]
    assert {step for step, *_ in seen} == {0, 1} and {block for _, block, *_ in seen} == set(range(BLOCKS))
    assert [config.error_weight for config in measured.configs] == pytest.approx([0.3 * 4**n for n in range(-2, 3)])
    assert len({weight for *_, weight in seen}) == 2  # balanced has a ramp
    for call, (_, _, q, k, v, layout, out, weight) in zip(measured.calls, seen, strict=True):
        reference = exact(q, k, v)
        factor = weight / 0.3  # the weights that are tried are the preset's, multiplied as the run's own is
        for config, error, density in zip(measured.configs, call.errors, call.densities, strict=True):
            own = dataclasses.replace(config, error_weight=config.error_weight * factor)
            other, stats = psa_attention(q, k, v, layout=layout, config=own, backend="reference", stats=True)
            if config.error_weight == 0.3:
                assert torch.equal(other, out)
                assert error > 0.01 or weight < 0.01  # as in the first step
            distance = float((other.double() - reference).norm() / reference.norm())
            assert error == pytest.approx(distance, rel=1e-4, abs=1e-6)  # fp32 alone is 2e-7 apart
            assert density == pytest.approx(float(stats.density.mean()))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_the_latent_is_ksamplers_to_the_bit(model: Any, sampler: str) -> None:
    def draws(func: Any, *args: Any, **kwargs: Any) -> Any:
        torch.rand(7)  # as an attention that draws its sample of rows anew each time
        return func(*args, **kwargs)

    # All that goes to another node's override is cross attention, and with the probe dense attention as well.
    patched = patch(override(model, draws), **SPARSE)
    after = []
    outputs = []
    for run in (lambda: ksample(patched, sampler=sampler), lambda: probe(patched, 0.5, sampler=sampler)[0]):
        torch.manual_seed(5)
        outputs.append(run())
        after.append(torch.get_rng_state())
    assert torch.equal(*outputs)
    assert torch.equal(*after)


def test_two_samplers_after_each_other_give_what_ksampler_advanced_gives(model: Any) -> None:
    from nodes import KSamplerAdvanced

    patched = patch(model, **SPARSE)
    shared = arguments()
    del shared["denoise"]
    shared["noise_seed"] = shared.pop("seed")
    half = KSamplerAdvanced().sample(
        patched, add_noise="enable", start_at_step=0, end_at_step=2, return_with_leftover_noise="enable", **shared
    )[0]
    first, report, _ = probe(patched, advanced={"end_at_step": 2, "return_with_leftover_noise": True})
    assert torch.equal(first, half["samples"])
    assert f"{2 * BLOCKS} of {2 * BLOCKS} sparse calls were compared" in report
    shared["latent_image"] = half
    whole = KSamplerAdvanced().sample(
        patched, add_noise="disable", start_at_step=2, end_at_step=9, return_with_leftover_noise="disable", **shared
    )[0]
    from psa_pack.nodes.quality_probe import PSAQualityProbe

    given = arguments() | {"latent_image": half}
    out = PSAQualityProbe.execute(patched, **given, share=1.0, wanted_error=0.1, add_noise=False, start_at_step=2)
    assert torch.equal(out.args[0]["samples"], whole["samples"])


def test_the_suggested_weight_brings_the_error_nearer_to_the_wanted_one(model: Any) -> None:
    """How near, a trained model tells over HTTP; with these random weights all pairs change their level at once."""
    weights, far = [], SPARSE | {"error_weight": 1.2}
    for wanted in (0.05, 0.1):
        _, report, preset = probe(patch(model, **far), 0.5, wanted)
        assert preset.config.error_weight is not None
        weights.append(preset.config.error_weight)
        assert f"error_weight: {weights[-1]}" in report
        _, after, _ = probe(patch(model, **SPARSE | {"error_weight": weights[-1]}), 0.5)
        assert abs(math.log(running_error(after) / wanted)) < abs(math.log(running_error(report) / wanted)) / 3
    assert weights == sorted(set(weights)) and weights[-1] < 1.2


def test_the_preset_can_be_used_and_saved(model: Any, user_folder: Path) -> None:
    from psa_pack.nodes.preset import PSAPreset

    base = patch(model, **SPARSE, dense_blocks="-1")
    _, _, preset = probe(base, 0.5)
    assert preset.name == "balanced-probed" and preset.family == "wan2.1_1.3b"
    assert preset.source.endswith("PSA Quality Probe for a mean error of 0.1")
    blocks = BlockList.parse("-1")
    assert preset.schedule == Schedule(dense_blocks=blocks, end_percent=preset.schedule.end_percent, ramp=1)
    assert parse_presets(dump_preset(preset), "test") == {preset.name: preset}
    _, again, _ = probe(patch(model, custom_preset=preset, backend="reference"))
    assert f"with error_weight {preset.config.error_weight}" in again
    assert again.startswith("PSA Quality Probe: wan2.1_1.3b balanced-probed\n")
    PSAPreset.execute("mine", base=preset, save=True)
    assert f"error_weight: {preset.config.error_weight}" in (user_folder / "psa_presets/mine.yaml").read_text()
    # A probed preset that is probed again keeps its name.
    assert probe(patch(model, custom_preset=preset, backend="reference"), 0.5)[2].name == "balanced-probed"


def test_the_report_shows_blocks_steps_and_cost(model: Any) -> None:
    _, report, _ = probe(patch(model, **SPARSE), 0.25, steps=8, cfg=1.0)
    lines = report.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("blocks"))
    assert [cell.strip() for cell in lines[head].split("|")] == [
        "blocks", "steps 1-2", "steps 3-4", "steps 5-6", "steps 7-8", "all",
    ]  # fmt: skip
    assert [line.partition(" ")[0] for line in lines[head + 2 : head + 2 + BLOCKS]] == ["0", "1", "2", "3"]
    cost = re.search(r"8 of 32 sparse calls were compared. Probing took ([\d.]+) s of ([\d.]+) s of sampling: ", report)
    assert cost is not None and 0 < float(cost[1]) < float(cost[2])
    assert float(re.search(r"the run was ([\d.]+) times as long", report)[1]) > 1  # type: ignore[index]


@pytest.mark.parametrize(("share", "blocks"), [(0.1, 30), (0.1, 33), (0.25, 40), (0.3, 30), (1 / 3, 12), (1.0, 4)])
def test_every_step_and_every_block_has_its_share(comfyui: Path, share: float, blocks: int) -> None:
    from psa_pack.nodes.probe import Probe

    measure = Probe(PSAConfig(error_weight=0.01), share)
    period = -int(-1 // share)
    chosen = [{block for block in range(blocks) if measure.wants(step, block)} for step in range(period)]
    for step in chosen:
        assert abs(len(step) - share * blocks) < 1.01
    assert set.union(*chosen) == set(range(blocks))


def test_comparisons_that_fail_cost_themselves_only(model: Any) -> None:
    calls = []

    def short_of_memory(func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        if q.shape == k.shape:
            calls.append(q.shape)
            if len(calls) % 4 == 0:
                raise torch.OutOfMemoryError("no memory left")
            if len(calls) % 4 == 1:
                raise RuntimeError("something else\nin several lines")
        return func(q, k, *args, **kwargs)

    patched = patch(override(model, short_of_memory), **SPARSE)
    out, report, _ = probe(patched)
    assert torch.equal(out, ksample(patched))
    assert len(calls) == STEPS * BLOCKS
    assert "8 of 16 sparse calls were compared" in report
    assert "4 comparisons were given up for want of memory." in report
    assert "4 comparisons were given up after RuntimeError: something else in several lines." in report


def test_errors_that_are_no_numbers_are_left_out_and_said(model: Any) -> None:
    calls = []

    def broken(func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = func(q, k, *args, **kwargs)
        if q.shape == k.shape:
            calls.append(q.shape)
            if len(calls) % 2:
                out = out * float("nan" if len(calls) % 4 == 1 else "inf")
        return out

    patched = patch(override(model, broken), **SPARSE)
    _, report, preset = probe(patched)
    assert "8 comparisons gave no finite error and are left out; in 8 of them dense attention itself" in report
    assert 0 < preset.config.error_weight < float("inf")
    assert "nan" not in report and "inf" not in report.replace("finite", "")


def test_a_comparison_that_never_gives_a_number_suggests_nothing(model: Any) -> None:
    def broken(func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        return func(q, k, *args, **kwargs) * (float("nan") if q.shape == k.shape else 1.0)

    patched = patch(override(model, broken), **SPARSE)
    _, report, preset = probe(patched)
    assert "No comparison gave a number. The preset is unchanged." in report
    assert preset.config.error_weight == 0.3 and preset.name == "balanced"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_tokens": 10000}, "shorter than min_tokens 10000"),
        ({"backend": "auto"}, "PSA is made for NVIDIA GPUs"),
        ({"dense_blocks": "0-3"}, "in dense_blocks"),
    ],
)
def test_where_nothing_is_sparse_the_report_says_why(model: Any, changes: dict[str, Any], said: str) -> None:
    from psa_pack.nodes.attention_patch import AttentionPatch

    patched = patch(model, **SPARSE | changes)
    out, report, preset = probe(patched)
    assert torch.equal(out, ksample(patched))
    assert "No attention call was sparse" in report and said in report
    assert preset == AttentionPatch.find(patched).settings.preset


def test_a_sampler_with_no_step_to_take_says_so(model: Any) -> None:
    patched = patch(model, **SPARSE)
    ksample(patched)  # whose record must not be taken for the probe's
    _, report, preset = probe(patched, advanced={"start_at_step": 100})
    assert "Nothing was sampled" in report and preset.name == "balanced"


def test_a_share_that_meets_no_call_says_so(model: Any) -> None:
    _, report, preset = probe(patch(model, **SPARSE, dense_blocks="0"), 0.01, steps=1)
    assert "None of the 3 sparse calls was in the share" in report and preset.name == "balanced"


def test_blocks_that_were_not_reached_are_named(model: Any) -> None:
    _, report, _ = probe(patch(model, **SPARSE), 0.34, steps=1)
    assert "2 of 4 sparse calls were compared" in report
    assert "No call of blocks 1-2 is among them; a larger share would reach them." in report
    assert "No call of" not in probe(patch(model, **SPARSE, dense_blocks="1-2"), 0.34, steps=1)[1]


@pytest.mark.parametrize("weight", [0.0, 1e6, 1e-6])
def test_weights_at_their_ends(model: Any, weight: float) -> None:
    _, report, preset = probe(patch(model, **SPARSE | {"error_weight": weight}), 0.5)
    assert 1e-6 <= preset.config.error_weight <= 1e6
    assert ("This run was exact" in report) == (weight == 0)
    assert ("The wanted error is above all that were measured" in report) == (weight != 1e6)
    assert ("The wanted error is below all that were measured" in report) == (weight == 1e6)


def test_a_preset_without_errors_is_measured_all_the_same(model: Any) -> None:
    config = PSAConfig(selection="topk", levels=(1, "skip"), ranges=((0.0, 0.5), (0.5, 1.0)))
    mine = Preset("mine", "my_family", "", "", config, Schedule())
    _, report, preset = probe(patch(model, custom_preset=mine, backend="reference"))
    assert "No error_weight is suggested: this preset selects by topk, not by error." in report
    assert running_error(report) > 0.01
    assert preset == mine


def test_the_users_model_is_left_as_it_was(model: Any, probes: list[Any]) -> None:
    patched = patch(model, **SPARSE)
    probe(patched)
    assert patched.model_options == {"transformer_options": {}}
    gc.collect()
    assert [made() for made in probes] == [None]
    assert record(patched).outcome == "finished"  # for whoever reports on the run of this patch


def test_an_interrupted_probe_leaves_nothing(model: Any, probes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_management import InterruptProcessingException
    from psa_pack.nodes import probe as module

    patched = patch(model, **SPARSE)
    plain = ksample(patched)
    measure = module.Probe._measure
    calls = []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise InterruptProcessingException
        return measure(self, *args)

    monkeypatch.setattr(module.Probe, "_measure", interrupted)
    with pytest.raises(InterruptProcessingException):
        probe(patched)
    calls.clear()
    monkeypatch.undo()
    gc.collect()
    assert [made() for made in probes] == [None]
    assert patched.model_options == {"transformer_options": {}}
    assert torch.equal(ksample(patched), plain)


def test_a_model_without_the_patch_is_refused(model: Any) -> None:
    for unpatched in (model, patch(model, "off")):
        with pytest.raises(ValueError, match="model: it is not patched; connect a model that comes from PSA Attention"):
            probe(unpatched)


@pytest.mark.parametrize(
    ("share", "wanted", "message"),
    [
        (0.0, 0.1, "share: 0.0 is not a number from 0.01 to 1"),
        (1.5, 0.1, "share: 1.5 is not"),
        (float("nan"), 0.1, "share: nan is not"),
        (0.5, 0.0, "wanted_error: 0.0 is not a number from 0.001 to 1"),
    ],
)
def test_values_out_of_range_are_refused(model: Any, share: float, wanted: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(patch(model, **SPARSE), share, wanted)


WEIGHTS = (0.001, 0.004, 0.016, 0.064, 0.256)


def probed(block: int, factor: float = 1.0, step: int = 0) -> Any:
    """A call whose error is ``factor`` times the cube root of the weight."""
    from psa_pack.nodes.probe import ProbedCall

    errors = tuple(factor * weight ** (1 / 3) for weight in WEIGHTS)
    return ProbedCall(step, block, errors, tuple(0.1 / weight ** (1 / 3) for weight in WEIGHTS))


@pytest.mark.parametrize("wanted", [0.15, 0.2, 0.3, 0.5])
def test_a_power_law_is_met_exactly(comfyui: Path, wanted: float) -> None:
    from psa_pack.nodes.suggestion import suggest

    suggestion = suggest([probed(0), probed(1, 0.8), probed(2, 1.2)], WEIGHTS, wanted)
    assert suggestion.error_weight == pytest.approx(wanted**3, rel=0.005)
    assert (suggestion.error, suggestion.dense_blocks) == (pytest.approx(wanted, rel=0.002), ())
    assert (suggestion.out_of_reach, 0.15 < suggestion.density < 1) == ("", True)


@pytest.mark.parametrize(("wanted", "weight", "side"), [(0.01, 0.001, "below"), (0.9, 0.256, "above")])
def test_beyond_what_was_measured_the_nearest_weight_is_named(
    comfyui: Path, wanted: float, weight: float, side: str
) -> None:
    from psa_pack.nodes.suggestion import suggest

    suggestion = suggest([probed(0)], WEIGHTS, wanted)
    assert (suggestion.error_weight, suggestion.out_of_reach) == (weight, side)
    assert suggestion.error == pytest.approx(weight ** (1 / 3))


def test_a_block_that_stands_out_stays_dense_and_the_others_get_more(comfyui: Path) -> None:
    from psa_pack.nodes.suggestion import suggest

    calls = [probed(block, 1.9 if block == 3 else 4.0 if block in (0, 7, 8) else 1.0) for block in range(12)]
    suggestion = suggest(calls, WEIGHTS, 0.2)
    assert suggestion.dense_blocks == (0, 7, 8)
    rest = (8 * 1.0 + 1.9) / 9
    assert suggestion.error_weight == pytest.approx((0.2 / rest) ** 3, rel=0.005)
    # All far above what is wanted, but none above the others.
    assert suggest([probed(block, 4.0) for block in range(6)], WEIGHTS, 0.01).dense_blocks == ()


def test_an_error_that_falls_by_chance_does_not_turn_the_curve_around(comfyui: Path) -> None:
    from psa_pack.nodes.probe import ProbedCall
    from psa_pack.nodes.suggestion import suggest

    call = ProbedCall(0, 0, (0.02, 0.03, 0.029, 0.05, 0.0), (0.5, 0.4, 0.3, 0.2, 0.1))
    weights = [suggest([call], WEIGHTS, wanted).error_weight for wanted in (0.02, 0.025, 0.03, 0.04, 0.05)]
    assert weights == sorted(weights) and weights[0] == 0.001
    zero = ProbedCall(0, 0, (0.0,) * 5, (1.0,) * 5)
    assert suggest([zero], WEIGHTS, 0.04).error_weight == 0.256


@pytest.mark.parametrize(
    ("given", "added", "text"),
    [("", (0, 1, 3), "0-1, 3"), ("0, -1", (5,), "0, 5, 39"), ("-1", (), "-1"), ("2-4", (5, 39), "2-5, 39")],
)
def test_dense_blocks_are_written_as_the_patch_takes_them(
    comfyui: Path, given: str, added: tuple[int, ...], text: str
) -> None:
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.quality_probe import dense_blocks_text, suggested_preset
    from psa_pack.nodes.suggestion import Suggestion

    blocks = BlockList.parse(given)
    preset = Preset("mine", "own", "", "", PSAConfig(error_weight=0.1), Schedule(dense_blocks=blocks))
    settings = PatchSettings("own mine", (), preset, blocks.resolve(40), "auto", False)
    suggestion = Suggestion(0.02, added, 0.04, 0.2)
    assert dense_blocks_text(settings, suggestion) == text
    made = suggested_preset(settings, suggestion, 0.04)
    assert made.schedule.dense_blocks.resolve(40) == blocks.resolve(40) | set(added)
    assert (made.name, made.config.error_weight) == ("mine-probed", 0.02)
    settings = dataclasses.replace(settings, preset=dataclasses.replace(preset, name="n" * 64))
    long = suggested_preset(settings, suggestion, 0.04)
    assert len(long.name) == 64 and long.name.endswith("n-probed")


def reports() -> Iterator[list[Any]]:
    """A report for everything that the node can have to say."""
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.probe import Probe
    from psa_pack.nodes.quality_probe import describe
    from psa_pack.nodes.run_record import CallRecord, RunRecord
    from psa_pack.nodes.suggestion import suggest
    from psa_pack.nodes.words import Words

    ranked = {"selection": "topk", "levels": (1, "skip"), "ranges": ((0, 0.5), (0.5, 1))}
    sparse = tuple(CallRecord(0, block, 20, 1, 0.1, 0.2, (1, 0)) for block in range(13))
    run = RunRecord("own mine", "finished", 1.0, 4, 4, 13, {}, "", 0, 0.2, 20, "reference", None, (1, "block"), sparse)
    unused = dataclasses.replace(run, sparse_calls=0, calls=())

    def report(
        config: PSAConfig, calls: Any, wanted: float, run: Any = run, ramp: float = 0, **found: Any
    ) -> list[Any]:
        probe = Probe(config, 0.1)
        probe.calls = calls
        for name, value in found.items():
            setattr(probe, name, value)
        preset = Preset("mine", "own", "", "", config, Schedule(ramp=ramp))
        settings = PatchSettings("own mine", (), preset, frozenset(), "auto", False)
        weights = tuple(variant.error_weight for variant in probe.configs)
        return describe(probe, settings, run, suggest(calls, weights, wanted) if calls else None, wanted)

    usual, alike = PSAConfig(error_weight=0.016), [probed(block) for block in range(12)]
    for wanted in (0.001, 0.2, 0.9):
        yield report(usual, alike, wanted)
    yield report(usual, [*alike, probed(12, 9.0)], 0.2)
    yield report(usual, alike, 0.2, ramp=1)
    yield report(PSAConfig(error_weight=0.0), alike, 0.2)
    single = [dataclasses.replace(call, errors=call.errors[:1], densities=call.densities[:1]) for call in alike]
    yield report(PSAConfig(**ranked), single, 0.2)
    yield report(usual, alike, 0.2, dropped=Counter({Words.of("no_memory"): 2}), not_finite=3, dense_not_finite=1)
    yield report(usual, [], 0.2, run=None)
    yield report(usual, [], 0.2, run=unused)
    yield report(usual, [], 0.2, not_finite=1)
    yield report(usual, [], 0.2)


def test_every_sentence_has_its_chinese(comfyui: Path) -> None:
    from psa_pack.nodes.quality_probe import beginning, in_words

    said = set()
    for report in reports():
        lines = [line for part in report if not isinstance(part, str) for line in part]
        said |= {line.key for line in lines}
        assert set(beginning(report)) <= set(lines)
        for language in ("en", "zh"):
            text = in_words(report, language)
            assert [line.say(language) for line in lines if line.say(language) not in text] == []
        for line in lines:
            assert line.say("zh") != line.say("en") or line.key in ("weight_value", "blocks_value"), line
    assert len(said) > 20

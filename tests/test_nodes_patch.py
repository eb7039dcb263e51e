"""PSA Attention Patch on a small Wan model, sampled by a real ComfyUI."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from psa_pack.psa_core.config import PSAConfig
from psa_pack.psa_core.presets import Preset
from psa_pack.psa_core.schedule import BlockList, Schedule
from torch import Tensor

from runs import reasons, record
from tiny_wan import BLOCKS, TOKENS, make_model, make_network, sample

pytestmark = pytest.mark.usefixtures("one_thread")

OVERRIDE = "optimized_attention_override"
EVERYWHERE = {"start_percent": 0.0, "min_tokens": 0, "backend": "reference"}
SPARSE = {**EVERYWHERE, "error_weight": 1.0}


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def dense(model: Any) -> Tensor:
    return sample(model)


def patch(model: Any, preset: str = "balanced", **inputs: Any) -> Any:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    return PSAAttentionPatch.execute(model, preset, **inputs).args[0]


def distance(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def preset(selection: str = "error", **schedule: Any) -> Preset:
    config = PSAConfig(error_weight=0.1)
    if selection != "error":
        config = PSAConfig(selection="topk", levels=(1, "skip"), ranges=((0.0, 0.5), (0.5, 1.0)))
    return Preset("mine", "my_family", "", "", config, Schedule(**schedule))


def test_error_weight_zero_is_dense_up_to_rounding(model: Any, dense: Tensor) -> None:
    patched = patch(model, error_weight=0.0, **EVERYWHERE)
    out = sample(patched)
    assert record(patched).sparse_calls == 4 * BLOCKS
    assert record(patched).density == 1.0
    assert distance(out, dense) < 1e-5


def test_a_sparse_run_is_near_the_dense_one_and_always_the_same(model: Any, dense: Tensor) -> None:
    patched = patch(model, **SPARSE)
    out = sample(patched)
    assert 0 < distance(out, dense) < 0.05
    assert record(patched).density < 0.5
    assert (record(patched).steps, record(patched).sparse_steps, record(patched).tokens) == (4, 4, TOKENS)
    assert torch.equal(sample(patched), out)


@pytest.mark.parametrize("name", ["balanced", "quality", "fast"])
def test_named_presets_come_from_the_models_family(model: Any, name: str) -> None:
    patched = patch(model, name, **EVERYWHERE)
    sample(patched)
    assert record(patched).title == f"wan2.1_1.3b {name}"
    assert record(patched).sparse_calls == 4 * BLOCKS


def test_off_and_short_videos_change_nothing(model: Any, dense: Tensor) -> None:
    assert torch.equal(sample(patch(patch(model, **SPARSE), "off")), dense)
    short = patch(model)
    assert torch.equal(sample(short), dense)
    assert record(short).sparse_calls == 0
    assert "shorter than min_tokens 16000" in reasons(record(short))


def test_the_model_that_was_patched_is_left_as_it_was(model: Any, dense: Tensor) -> None:
    patched = patch(model, **SPARSE, dense_blocks="0")
    sample(patched)
    assert patched.model_options == model.model_options == {"transformer_options": {}}
    assert not any(model.wrappers.values())
    assert torch.equal(sample(model), dense)


def test_the_latest_patch_on_a_model_wins(model: Any) -> None:
    twice = patch(patch(model, **SPARSE), **SPARSE, dense_blocks="0")
    sample(twice)
    assert len(twice.get_all_wrappers("diffusion_model")) == 1
    assert reasons(record(twice)) == {"in dense_blocks": 4}


# Ten steps at 0, 0.1, ... of the sampling, whatever the shift; one that lies on an edge begins what follows the edge.
@pytest.mark.parametrize(
    ("window", "sparse_steps"),
    [((0.0, 1.0), 10), ((0.3, 1.0), 7), ((0.0, 0.5), 5), ((0.3, 0.5), 2), ((0.95, 1.0), 0)],
)
@pytest.mark.parametrize("shift", [None, 5.0])
def test_the_schedule_counts_in_the_running_models_sigmas(
    model: Any, window: tuple[float, float], sparse_steps: int, shift: float | None
) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    start, end = window
    patched = patch(model, **SPARSE | {"start_percent": start}, end_percent=end)
    if shift is not None:  # a node after the patch, which had not run yet when the patch was made
        patched = ModelSamplingSD3().patch(patched, shift)[0]
    sample(patched, steps=10, cfg=1.0)
    assert (record(patched).steps, record(patched).sparse_steps) == (10, sparse_steps)


def test_split_samplers_share_one_schedule(model: Any) -> None:
    patched = patch(model, **SPARSE | {"start_percent": 0.3})
    sparse_steps = []
    for start, last in ((0, 5), (5, 10)):
        sample(patched, steps=10, cfg=1.0, start_step=start, last_step=last)
        sparse_steps.append((record(patched).steps, record(patched).sparse_steps))
    assert sparse_steps == [(5, 2), (5, 5)]


@pytest.mark.parametrize(
    ("run", "calls"),
    [
        ({"cfg": 1.0}, 4),
        ({"cfg": 6.0}, 4),  # both conditions in one batch
        ({"cfg": 6.0, "negative_context": 100}, 8),  # one condition after the other
        ({"latent": (1, 10, 14)}, 4),
        ({"latent": (5, 15, 13)}, 4),
    ],
)
def test_every_way_to_call_the_model_works(model: Any, run: dict[str, Any], calls: int) -> None:
    patched = patch(model, error_weight=0.0, **EVERYWHERE)
    assert distance(sample(patched, **run), sample(model, **run)) < 1e-5
    assert record(patched).sparse_calls == calls * BLOCKS
    assert record(patched).steps == 4


def test_one_patch_samples_one_resolution_after_another(model: Any) -> None:
    patched = patch(model, **SPARSE)
    first = sample(patched)
    sample(patched, latent=(2, 20, 12))
    assert record(patched).tokens == 2 * 10 * 6
    assert torch.equal(sample(patched), first)


def test_image_to_video_goes_sparse_in_its_self_attention_only(comfyui: Path) -> None:
    model = make_model(model_type="i2v", in_dim=36)
    patched = patch(model, error_weight=0.0, **EVERYWHERE)
    assert distance(sample(patched), sample(model)) < 1e-5
    # It looks at the text and at the image in cross attention of its own each.
    assert (record(patched).sparse_calls, record(patched).other_calls) == (4 * BLOCKS, 8 * BLOCKS)


@pytest.mark.parametrize("blocks", ["0", "-1", "0-1"])
def test_dense_blocks_stay_dense(model: Any, dense: Tensor, blocks: str) -> None:
    patched = patch(model, **SPARSE, dense_blocks=blocks)
    out = sample(patched)
    count = len(BlockList.parse(blocks).resolve(BLOCKS))
    assert reasons(record(patched)) == {"in dense_blocks": 4 * count}
    assert record(patched).sparse_calls == 4 * (BLOCKS - count)
    assert torch.equal(out, dense) == (count == BLOCKS)


def test_another_nodes_block_replacement_still_runs(model: Any) -> None:
    replaced = model.clone()
    seen = []

    def replacement(arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(arguments["img"].shape[1])
        return extra["original_block"](arguments)

    replaced.set_model_patch_replace(replacement, "dit", "double_block", 0)
    plain = sample(patch(model, **SPARSE, dense_blocks="0"))
    patched = patch(replaced, **SPARSE, dense_blocks="0")
    assert torch.equal(sample(patched), plain)
    assert seen == [TOKENS] * 4
    assert reasons(record(patched)) == {"in dense_blocks": 4}


@pytest.mark.parametrize("before", [True, False])
def test_another_override_gets_what_stays_dense_in_either_order(model: Any, before: bool) -> None:
    calls = []

    def other(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[1].shape[1])
        return func(*args, **kwargs)

    settings = SPARSE | {"start_percent": 0.5}
    plain = sample(patch(model, **settings))
    source = model.clone()
    if before:
        source.model_options["transformer_options"][OVERRIDE] = other
    patched = patch(source, **settings)
    if not before:
        patched.model_options["transformer_options"][OVERRIDE] = other
    assert torch.equal(sample(patched), plain)
    assert sorted(calls) == [77] * 4 * BLOCKS + [TOKENS] * 2 * BLOCKS
    assert patched.model_options["transformer_options"][OVERRIDE] is other


def test_easycache_and_psa_go_together(model: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    cached = EasyCacheNode.execute(patch(model, **SPARSE), 10.0, 0.1, 0.95, False).args[0]
    assert torch.isfinite(sample(cached, steps=10)).all()
    assert 0 < record(cached).sparse_steps < 10


@pytest.mark.parametrize("dense_blocks", ["", "0"])
@pytest.mark.parametrize("before", [True, False])
def test_no_gate_is_frozen_by_torch_compile(model: Any, before: bool, dense_blocks: str) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    settings = SPARSE | {"start_percent": 0.5, "dense_blocks": dense_blocks}
    plain = patch(model, **settings)
    expected = sample(plain)
    torch._dynamo.reset()
    source = model.clone()
    if before:
        set_torch_compile_wrapper(source, backend="eager")
    patched = patch(source, **settings)
    if not before:
        set_torch_compile_wrapper(patched, backend="eager")
    assert distance(sample(patched), expected) < 1e-5
    assert record(patched).dense_calls == record(plain).dense_calls
    assert record(patched).sparse_calls == record(plain).sparse_calls
    torch._dynamo.reset()


def test_an_interrupted_run_leaves_nothing_behind(model: Any, dense: Tensor) -> None:
    from comfy.model_management import InterruptProcessingException

    interrupts = [True]

    def interrupt(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if interrupts and args[1].shape[1] == 77:
            interrupts.pop()
            raise InterruptProcessingException
        return func(*args, **kwargs)

    source = model.clone()
    source.model_options["transformer_options"][OVERRIDE] = interrupt
    patched = patch(source, **SPARSE)
    with pytest.raises(InterruptProcessingException):
        sample(patched)
    assert (record(patched).outcome, record(patched).sparse_calls, record(patched).steps) == ("interrupted", 1, 1)
    assert patched.model_options["transformer_options"] == {OVERRIDE: interrupt}
    assert torch.equal(sample(patched), sample(patch(model, **SPARSE)))
    assert (record(patched).outcome, record(patched).steps) == ("finished", 4)


def test_a_failing_run_fails_as_it_would_without_the_node(model: Any) -> None:
    def fail(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("dense attention ran out of memory")

    source = model.clone()
    source.model_options["transformer_options"][OVERRIDE] = fail
    patched = patch(source, **SPARSE)
    with pytest.raises(torch.OutOfMemoryError, match="dense attention"):
        sample(patched)
    assert record(patched).outcome == "failed"


def test_an_interrupt_inside_the_sparse_path_is_no_kernel_failure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_management import InterruptProcessingException
    from psa_pack.nodes import session

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise InterruptProcessingException

    monkeypatch.setattr(session, "psa_attention", interrupt)
    with pytest.raises(InterruptProcessingException):
        sample(patch(model, **SPARSE))


def test_a_broken_kernel_turns_the_run_dense_and_says_why_once(
    model: Any, dense: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from psa_pack.nodes import session

    real, calls = session.psa_attention, []

    def break_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("the kernel broke")
        return real(*args, **kwargs)

    monkeypatch.setattr(session, "psa_attention", break_at_the_third)
    patched = patch(model, error_weight=0.0, **EVERYWHERE)
    assert distance(sample(patched), dense) < 1e-5
    assert record(patched).sparse_calls == 2
    assert reasons(record(patched)) == {"because PSA could not run (RuntimeError: the kernel broke)": 4 * BLOCKS - 2}
    assert [line.levelname for line in caplog.records if "dense for the rest of this run" in line.message] == [
        "WARNING"
    ]
    sample(patched)
    assert record(patched).sparse_calls == 4 * BLOCKS


def test_a_failed_self_check_turns_the_run_dense(model: Any, dense: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    checked = []

    def fail(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str, config: PSAConfig) -> None:
        checked.append((device.type, dtype, head_dim, backend, config.error_weight))
        raise session.SelfCheckFailed("the kernel differs from dense attention")

    monkeypatch.setattr(session, "self_check", fail)
    patched = patch(model, **SPARSE)
    assert torch.equal(sample(patched), dense)
    assert checked == [("cpu", torch.float32, 128, "reference", 1.0)]
    assert reasons(record(patched)) == {
        "because PSA could not run (the kernel differs from dense attention)": 4 * BLOCKS
    }


def test_a_backend_that_cannot_run_here_leaves_the_run_dense(
    model: Any, dense: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    patched = patch(model, **SPARSE | {"backend": "triton"})
    assert torch.equal(sample(patched), dense)
    (reason,) = reasons(record(patched))
    assert "Triton" in reason


def test_a_device_that_psa_is_not_made_for_is_named(comfyui: Path) -> None:
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.session import Session
    from psa_pack.psa_core import TokenLayout

    session = Session(PatchSettings("t", (), preset(), frozenset(), "auto", False), lambda p: 1 - p, print)
    layout = TokenLayout((1, 4, 4))
    session.begin_model_call(0.5, layout)
    q = torch.empty(1, 2, 16, 64, device="meta")
    assert session.attend(q, q, q, layout, preset().config, None, 0, dense=lambda: q) is None
    (reason,) = reasons(session.finish("finished"))
    assert "PSA is made for NVIDIA GPUs; on meta only the backend 'reference' works" in reason


def test_on_a_cpu_the_kernels_do_not_run_and_the_run_says_so(model: Any, dense: Tensor) -> None:
    patched = patch(model, **SPARSE | {"backend": "auto"})
    assert torch.equal(sample(patched), dense)
    (reason,) = reasons(record(patched))
    assert "PSA is made for NVIDIA GPUs; on cpu only the backend 'reference' works" in reason


def test_an_unknown_model_stays_dense_and_the_run_says_so(comfyui: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = make_model()
    network = model.model.diffusion_model
    network.__class__ = type("OtherWanModel", (type(network),), {})
    dense = sample(model)
    patched = patch(model, **SPARSE)
    assert torch.equal(sample(patched), dense)
    assert "not used: OtherWanModel is not a model that PSA knows (WanModel, CameraWanModel" in caplog.text


def test_a_model_whose_attention_was_replaced_is_reported(
    model: Any, dense: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.ldm.wan.model as wan

    real = wan.optimized_attention

    def without_options(*args: Any, transformer_options: Any = None, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs)

    monkeypatch.setattr(wan, "optimized_attention", without_options)
    patched = patch(model, **SPARSE)
    assert torch.equal(sample(patched), dense)
    assert "another node has probably replaced the model's attention functions" in str(record(patched).unused_cause)


def test_a_run_that_calls_no_model_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model.model.diffusion_model
    monkeypatch.setattr(network, "forward", lambda x, *args, **kwargs: torch.zeros_like(x))
    patched = patch(model, **SPARSE)
    sample(patched)
    assert "not called through ComfyUI's diffusion model wrappers" in str(record(patched).unused_cause)


def test_the_log_has_one_line_per_run_and_one_per_step_if_asked(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="psa_pack")
    settings = SPARSE | {"start_percent": 0.5}
    sample(patch(model, **settings))
    (line,) = (entry.message for entry in caplog.records if entry.name.startswith("psa_pack"))
    assert line.startswith("PSA wan2.1_1.3b balanced: 4 sparse calls (mean density 0.")
    assert "4 dense calls (4 before start_percent 0.5); 2 of 4 steps sparse; 216 tokens; finished after" in line
    caplog.clear()
    sample(patch(model, **settings, verbose=True))
    lines = [entry.message for entry in caplog.records if entry.name.startswith("psa_pack")]
    assert len(lines) == 5
    assert "step 1: dense, before start_percent 0.5 (sigma 1.0000, 0 sparse and 2 dense calls)" in lines[0]
    assert "step 4: sparse, density so far 0." in lines[3]


def test_the_node_shows_its_status(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    sent = []
    server = SimpleNamespace(instance=SimpleNamespace(send_progress_text=lambda text, node: sent.append((node, text))))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=server))
    node = type("WithHidden", (PSAAttentionPatch,), {"hidden": SimpleNamespace(unique_id="7")})
    patched = node.execute(model, "balanced", **SPARSE).args[0]
    note = "no released Wan has width 256\nand 2 blocks; Wan 2.1 1.3B is\nthe nearest"
    assert sent == [("7", f"PSA wan2.1_1.3b balanced\n{note}")]
    sample(patched)
    assert len(sent) == 1 + 4 + 1
    assert "step 1: sparse\ndensity so far " in sent[1][1]
    assert "4 of 4 steps sparse\nmean density 0." in sent[-1][1]
    assert "\nerror_weight 0.016 to 0.75\n" in sent[-1][1]
    assert all(node_id == "7" and text.endswith(note) for node_id, text in sent)


def test_a_custom_preset_wins(model: Any) -> None:
    patched = patch(model, "fast", custom_preset=preset(dense_blocks=BlockList.parse("-1")), backend="reference")
    sample(patched)
    assert record(patched).title == "my_family mine"
    assert reasons(record(patched)) == {"in dense_blocks": 4}


def test_the_nodes_values_win_over_a_custom_preset(model: Any) -> None:
    mine = preset(start_percent=0.5, end_percent=0.6, min_tokens=10**6, dense_blocks=BlockList.parse("0"))
    patched = patch(model, custom_preset=mine, **SPARSE, end_percent=1.0, dense_blocks="-1")
    sample(patched)
    assert reasons(record(patched)) == {"in dense_blocks": 4}
    assert record(patched).sparse_calls == 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"start_percent": 1.5}, "start_percent: 1.5 is not a number from 0 to 1; -1 takes the preset's value"),
        ({"start_percent": -0.5}, "start_percent: -0.5 is not a number from 0 to 1"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent: 0.6 is not below end_percent, 0.4"),
        ({"end_percent": 0.0}, "start_percent: 0.0 is not below end_percent, 0.0"),
        ({"error_weight": -2}, "error_weight: -2 is not a number from 0 (dense) to 1e6; -1 takes the preset's value"),
        ({"min_tokens": -5}, "min_tokens: -5 is not a whole number of tokens from 0 to 2147483647"),
        ({"dense_blocks": "first"}, "dense_blocks: 'first' in 'first' is neither a block"),
        ({"dense_blocks": "2"}, "dense_blocks: 2 is not a block of this model, which has 2"),
        ({"backend": "cuda"}, "backend: 'cuda' is not one of auto, triton, reference"),
        ({"preset": "best"}, "preset: wan2.1_1.3b.yaml has no preset 'best'; it has balanced, quality, fast"),
        (
            {"custom_preset": preset("topk"), "error_weight": 0.1},
            "error_weight: 0.1 has no meaning with selection 'topk'; -1 takes the preset's value",
        ),
    ],
)
def test_bad_input_is_refused_before_any_sampling(model: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        patch(model, **inputs)
    assert str(error.value).startswith(message)


def test_a_topk_preset_runs(model: Any) -> None:
    patched = patch(model, custom_preset=preset("topk"), backend="reference")
    sample(patched)
    assert record(patched).sparse_calls == 4 * BLOCKS


def test_nested_runs_do_not_see_each_others_sessions(model: Any) -> None:
    inner = patch(make_model(), **SPARSE, dense_blocks="0")  # ComfyUI cannot nest runs of the same weights
    outer_source = model.clone()
    done = []

    def sample_inside(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not done:
            done.append(sample(inner))
        return func(*args, **kwargs)

    outer_source.model_options["transformer_options"][OVERRIDE] = sample_inside
    outer = patch(outer_source, **SPARSE)
    sample(outer)
    assert (record(outer).sparse_calls, reasons(record(outer))) == (4 * BLOCKS, {})
    assert reasons(record(inner)) == {"in dense_blocks": 4}
    assert torch.equal(done[0], sample(inner))


def test_a_model_call_outside_sampling_is_left_alone(comfyui: Path) -> None:
    from comfy.patcher_extension import WrappersMP

    network = make_network()
    patched = patch(make_model(), **SPARSE)
    wrappers = {WrappersMP.DIFFUSION_MODEL: {"psa": patched.get_all_wrappers(WrappersMP.DIFFUSION_MODEL)}}
    x, context = torch.randn(1, 16, 3, 16, 18), torch.randn(1, 77, 4096)
    with torch.no_grad():
        plain = network(x, torch.tensor([500.0]), context=context, transformer_options={})
        wrapped = network(x, torch.tensor([500.0]), context=context, transformer_options={"wrappers": wrappers})
    assert torch.equal(plain, wrapped)

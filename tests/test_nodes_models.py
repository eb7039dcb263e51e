"""Where the video is among a model's tokens, checked against what ComfyUI's own models feed their attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.presets import Preset, load_presets
from psa_pack.psa_core.schedule import Schedule
from torch import Tensor

from conftest import ROOT
from runs import reasons
from tiny_wan import BLOCKS, DIM, make_network

pytestmark = pytest.mark.usefixtures("one_thread", "comfyui")


def latent(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def watch(network: torch.nn.Module, x: Tensor, **arguments: Any) -> tuple[Any, Tensor]:
    """Run a network; return the sequence as PSA reads it, and the tokens that enter the first block."""
    from comfy.patcher_extension import WrappersMP
    from psa_pack.nodes.models.known import read_sequence
    from psa_pack.nodes.override import name_arguments

    read, entered = [], []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(read_sequence(executor.class_obj, name_arguments(executor.original, args, kwargs)))
        return executor(*args, **kwargs)

    def enter(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0])

    hook = network.blocks[0].register_forward_pre_hook(enter)
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"test": [wrapper]}}}
    with torch.no_grad():
        network(x, torch.tensor([500.0]), context=latent(77, 4096), transformer_options=options, **arguments)
    hook.remove()
    return read[0], entered[0]


def embedded(network: torch.nn.Module, x: Tensor) -> Tensor:
    import comfy.ldm.common_dit

    with torch.no_grad():
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, network.patch_size)
        return network.patch_embedding(padded).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("shape", [(3, 16, 18), (1, 8, 8), (2, 15, 17), (5, 2, 1)])
def test_the_video_is_found_in_a_text_to_video_model(shape: tuple[int, int, int]) -> None:
    network, x = make_network(), latent(16, *shape)
    sequence, entered = watch(network, x)
    assert sequence.layout.tokens == entered.shape[1] == sequence.layout.video_tokens
    assert sequence.layout.grid == (shape[0], -(-shape[1] // 2), -(-shape[2] // 2))
    assert sequence.context_lengths == {77}
    torch.testing.assert_close(entered, embedded(network, x))


def test_frames_joined_to_the_video_stay_exact() -> None:
    network, x, joined = make_network(), latent(16, 3, 16, 18), latent(16, 2, 16, 18)
    sequence, entered = watch(network, x, time_dim_concat=joined)
    layout = sequence.layout
    assert (layout.video_start, layout.grid, layout.tokens) == (0, (3, 8, 9), entered.shape[1])
    torch.testing.assert_close(entered[:, : layout.video_tokens], embedded(network, x))


def test_a_reference_image_in_front_of_the_video_stays_exact() -> None:
    network, x = make_network(in_dim_ref_conv=16), latent(16, 3, 16, 18)
    sequence, entered = watch(network, x, reference_latent=latent(16, 16, 18))
    layout = sequence.layout
    assert (layout.video_start, layout.grid, layout.tokens) == (8 * 9, (3, 8, 9), entered.shape[1])
    torch.testing.assert_close(entered[:, layout.video_start :], embedded(network, x))


def test_a_reference_that_the_model_cannot_use_adds_no_tokens() -> None:
    sequence, entered = watch(make_network(), latent(16, 3, 16, 18), reference_latent=latent(16, 16, 18))
    assert sequence.layout.tokens == entered.shape[1] == sequence.layout.video_tokens


def test_context_latents_after_the_video_stay_exact() -> None:
    network, x = make_network(), latent(16, 3, 16, 18)
    extra = [latent(16, 1, 16, 18), latent(16, 2, 9, 8)]
    sequence, entered = watch(network, x, context_latents=extra)
    layout = sequence.layout
    if entered.shape[1] == layout.video_tokens:
        pytest.skip("this ComfyUI's Wan takes no context latents")
    assert (layout.video_start, layout.grid, layout.tokens) == (0, (3, 8, 9), entered.shape[1])
    torch.testing.assert_close(entered[:, : layout.video_tokens], embedded(network, x))


def test_the_image_context_of_an_image_to_video_model_is_known() -> None:
    network = make_network(model_type="i2v", in_dim=36)
    sequence, entered = watch(network, latent(36, 3, 16, 18), clip_fea=latent(257, 1280))
    assert sequence.layout.tokens == entered.shape[1]
    assert sequence.context_lengths == {77, 257, 334}


@dataclass(frozen=True)
class Variant:
    """A variant of Wan: its class, what it takes in beside the latent, and where the video is then."""

    cls: str
    settings: dict[str, Any]
    arguments: Callable[[], dict[str, Any]]
    layout: TokenLayout
    channels: int = 16
    calls: int = BLOCKS


GRID = (3, 8, 9)
VIDEO = TokenLayout(GRID)
VARIANTS = {
    "t2v": Variant("WanModel", {}, dict, VIDEO),
    "i2v": Variant(
        "WanModel", {"model_type": "i2v", "in_dim": 36}, lambda: {"clip_fea": latent(257, 1280)}, VIDEO, channels=36
    ),
    "flf2v": Variant(
        "WanModel",
        {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514},
        lambda: {"clip_fea": latent(514, 1280)},
        VIDEO,
        channels=36,
    ),
    "A14B i2v": Variant("WanModel", {"in_dim": 36}, dict, VIDEO, channels=36),
    "ti2v 5B": Variant("WanModel", {"in_dim": 48, "out_dim": 48}, dict, VIDEO, channels=48),
    "Fun Control": Variant(
        "WanModel",
        {"in_dim_ref_conv": 16},
        lambda: {"reference_latent": latent(16, 16, 18)},
        TokenLayout(GRID, video_start=72),
    ),
    "Phantom": Variant(
        "WanModel",
        {},
        lambda: {"time_dim_concat": latent(16, 2, 16, 18)},
        TokenLayout(GRID, tokens=216 + 144),
    ),
    "context latents": Variant(
        "WanModel",
        {},
        lambda: {"context_latents": [latent(16, 1, 16, 18), latent(16, 2, 8, 8)]},
        TokenLayout(GRID, tokens=216 + 72 + 32),
    ),
    "Fun Camera of Wan 2.1": Variant(
        "CameraWanModel",
        {"model_type": "camera", "in_dim": 32},
        lambda: {"camera_conditions": latent(24, 3, 128, 144), "clip_fea": latent(257, 1280)},
        VIDEO,
        channels=32,
    ),
    "Fun Camera of Wan 2.2": Variant(
        "CameraWanModel",
        {"model_type": "camera_2.2"},
        lambda: {"camera_conditions": latent(24, 3, 128, 144)},
        VIDEO,
    ),
    "VACE": Variant(
        "VaceWanModel",
        {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 16},
        lambda: {"vace_context": latent(1, 16, 3, 16, 18), "vace_strength": [0.8]},
        VIDEO,
        calls=BLOCKS + 1,
    ),
    "VACE with two controls": Variant(
        "VaceWanModel",
        {"model_type": "vace", "vace_layers": 2, "vace_in_dim": 16},
        lambda: {"vace_context": latent(2, 16, 3, 16, 18), "vace_strength": [0.8, 0.5]},
        VIDEO,
        calls=BLOCKS + 2 * 2,
    ),
    "Animate": Variant(
        "AnimateWanModel",
        {"num_layers": 5, "in_dim": 36},
        lambda: {
            "clip_fea": latent(257, 1280),
            "pose_latents": latent(16, 2, 16, 18),
            "face_pixel_values": latent(3, 5, 8, 8),
        },
        VIDEO,
        channels=36,
        calls=5,
    ),
    "HuMo": Variant(
        "HumoWanModel",
        {},
        lambda: {"reference_latent": latent(16, 1, 16, 18), "audio_embed": latent(3, 8, 5, 1280)},
        TokenLayout(GRID, tokens=216 + 72),
    ),
    "S2V": Variant(
        "WanModel_S2V",
        {"audio_dim": 64, "audio_inject_layers": [0]},
        lambda: {
            "reference_latent": latent(16, 1, 16, 18),
            "reference_motion": latent(16, 19, 16, 18),
            "control_video": latent(16, 3, 16, 18),
            "audio_embed": latent(25, 64, 12),
        },
        TokenLayout(GRID, tokens=216 + 72 + 72 + 4 * 4 + 4 * 2 * 2),
    ),
}


def find_class(name: str) -> type:
    from comfy.ldm.wan import model, model_animate

    return getattr(model, name, None) or getattr(model_animate, name)


def call(network: torch.nn.Module, variant: Variant, options: dict[str, Any]) -> Tensor:
    x, context = latent(variant.channels, 3, 16, 18), latent(77, 4096)
    with torch.no_grad():
        return network(x, torch.tensor([500.0]), context=context, transformer_options=options, **variant.arguments())


def run_patched(
    network: torch.nn.Module,
    variant: Variant,
    config: PSAConfig,
    dense_blocks: frozenset[int] = frozenset(),
    probe: Any = None,
) -> tuple[Tensor, Any]:
    """One call of a patched network; returns its output and the record of the run."""
    from comfy.patcher_extension import WrappersMP
    from psa_pack.nodes.attention_patch import AttentionPatch
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.session import Session

    settings = PatchSettings(
        "test", (), Preset("test", "wan", "", "", config, Schedule()), dense_blocks, "reference", False
    )
    session = Session(settings, lambda percent: 1 - percent, lambda text: None, probe)
    wrapper = AttentionPatch(settings, lambda text: None).around_model_call
    options = {
        "sigmas": torch.tensor([0.5]),
        "psa_attention": session,
        "wrappers": {WrappersMP.DIFFUSION_MODEL: {"psa_attention": [wrapper]}},
    }
    return call(network, variant, options), session.finish("finished")


def by_hand(layout: TokenLayout, config: PSAConfig) -> Callable[..., Tensor]:
    """An override that answers every self-attention over a sequence laid out like this with the reference."""

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, heads: int, **kwargs: Any) -> Tensor:
        if q.dim() != 3 or not q.shape[1] == k.shape[1] == layout.tokens:
            return func(q, k, v, *args, heads=heads, **kwargs)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = psa_attention(q, k, v, layout=layout, config=config, backend="reference")
        return out.transpose(1, 2).flatten(2)

    return override


def skip_what_this_comfyui_lacks(network: torch.nn.Module, variant: Variant) -> None:
    seen = []

    def override(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[0].shape[1])
        return func(*args, **kwargs)

    call(network, variant, {"optimized_attention_override": override})
    if not seen:
        pytest.skip(f"this ComfyUI's {variant.cls} passes no options to its blocks")
    if "context_latents" in variant.arguments() and variant.layout.tokens not in seen:
        pytest.skip("this ComfyUI's Wan takes no context latents")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_wan_runs_sparse_with_its_extra_tokens_exact(name: str) -> None:
    """With everything at level 1 it is the dense model; sparse, it is the reference given a layout written by hand."""
    variant = VARIANTS[name]
    network = make_network(find_class(variant.cls), **variant.settings)
    if variant.cls == "AnimateWanModel":  # a large image network before the model proper; only its answer matters here
        network.motion_encoder.get_motion = lambda faces: latent(len(faces), 512)[0]
    skip_what_this_comfyui_lacks(network, variant)
    balanced = load_presets(ROOT / "presets" / "wan2.1_14b.yaml")["balanced"].config

    exact, record = run_patched(network, variant, dataclasses.replace(balanced, error_weight=0.0))
    assert (record.sparse_calls, record.density, record.tokens) == (variant.calls, 1.0, variant.layout.tokens)
    dense = call(network, variant, {})
    assert float((exact - dense).norm() / dense.norm()) < 1e-5

    # So short a video is hardly pooled at balanced's own weight.
    config = dataclasses.replace(balanced, error_weight=1.0)
    sparse, record = run_patched(network, variant, config)
    assert record.sparse_calls == variant.calls
    assert record.density < 0.9
    assert torch.equal(
        sparse, call(network, variant, {"optimized_attention_override": by_hand(variant.layout, config)})
    )
    assert float((sparse - dense).norm() / dense.norm()) > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_cross_attention_is_known_by_its_length(name: str) -> None:
    """Whatever a block attends to beside its own tokens has a length that the sequence names: a video of that many
    tokens stays dense, since its own attention could not be told from it."""
    variant = VARIANTS[name]
    network = make_network(find_class(variant.cls), **variant.settings)
    if variant.cls == "AnimateWanModel":
        network.motion_encoder.get_motion = lambda faces: latent(len(faces), 512)[0]
    skip_what_this_comfyui_lacks(network, variant)
    looked_at = set()

    def override(func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        looked_at.add(k.shape[2 if kwargs.get("skip_reshape") else 1])
        return func(q, k, *args, **kwargs)

    arguments = {"x": latent(variant.channels, 3, 16, 18), "context": latent(77, 4096), **variant.arguments()}
    call(network, variant, {"optimized_attention_override": override})
    assert looked_at - {variant.layout.tokens} <= read(network, arguments).context_lengths


def read(network: torch.nn.Module, arguments: dict[str, Any]) -> Any:
    from psa_pack.nodes.models.known import read_sequence

    return read_sequence(network, arguments)


def test_a_probe_names_blocks_that_calls_do_not(comfyui: Any) -> None:
    """Where another node skips a block, its place among the calls would name the wrong one."""
    from comfy.patcher_extension import WrappersMP
    from psa_pack.nodes.attention_patch import AttentionPatch
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.probe import Probe
    from psa_pack.nodes.session import Session

    config = PSAConfig(error_weight=1.0)
    preset = Preset("test", "wan", "", "", config, Schedule())
    settings = PatchSettings("test", (), preset, frozenset(), "reference", False)
    probe = Probe(config, 1.0)
    session = Session(settings, lambda percent: 1 - percent, lambda lines: None, probe)

    def skip(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {"img": arguments["img"]}

    options = {
        "sigmas": torch.tensor([0.5]),
        "psa_attention": session,
        "patches_replace": {"dit": {("double_block", 0): skip}},
        "wrappers": {
            WrappersMP.DIFFUSION_MODEL: {
                "psa_attention": [AttentionPatch(settings, lambda lines: None).around_model_call]
            }
        },
    }
    call(make_network(), VARIANTS["t2v"], options)
    session.finish("finished")
    assert [found.block for found in probe.calls] == [1]


def test_vace_blocks_are_blocks_of_their_own() -> None:
    from psa_pack.nodes.models.known import identify

    variant = VARIANTS["VACE with two controls"]
    network = make_network(find_class(variant.cls), **variant.settings)
    facts = identify(network)
    assert len(facts.block_order) == BLOCKS + 2
    assert str(facts.notes[-1]) == "its VACE blocks count as blocks 2 to 3"
    config = PSAConfig(error_weight=1.0)
    # two controls go through a VACE block one after the other
    for dense_blocks, dense_calls in (({0}, 1), ({1}, 1), ({2}, 2), ({3}, 2), ({0, 3}, 3)):
        _, record = run_patched(network, variant, config, frozenset(dense_blocks))
        assert reasons(record) == {"in dense_blocks": dense_calls}
        assert record.sparse_calls == variant.calls - dense_calls
    outputs = [run_patched(network, variant, config, frozenset({block}))[0] for block in range(4)]
    assert not any(torch.equal(a, b) for a, b in combinations(outputs, 2))


@pytest.mark.parametrize("name", ["VACE", "VACE with two controls", "HuMo"])
def test_a_probe_names_every_block_and_changes_nothing(name: str) -> None:
    from psa_pack.nodes.models.known import identify
    from psa_pack.nodes.probe import Probe

    variant, config = VARIANTS[name], PSAConfig(error_weight=1.0)
    network = make_network(find_class(variant.cls), **variant.settings)
    probe = Probe(config, 1.0)
    out, record = run_patched(network, variant, config, probe=probe)
    assert {call.block for call in probe.calls} == set(range(len(identify(network).block_order)))
    assert len(probe.calls) == record.sparse_calls == variant.calls
    assert torch.equal(out, run_patched(network, variant, config)[0])


def test_blocks_that_get_no_options_stay_dense_with_the_reason() -> None:
    variant = VARIANTS["S2V"]
    network = make_network(find_class(variant.cls), **variant.settings)

    def without_options(block: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"transformer_options": {}}  # as in ComfyUI 0.3.75

    for block in network.blocks:
        block.register_forward_pre_hook(without_options, with_kwargs=True)
    out, record = run_patched(network, variant, PSAConfig(error_weight=1.0))
    assert torch.equal(out, call(network, variant, {}))
    assert "does not pass its options on to its blocks" in str(record.unused_cause)


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    from comfy.ldm.wan.model import WanModel
    from psa_pack.nodes.models.known import identify
    from psa_pack.nodes.models.sequence import UnsupportedModel

    class WanFork(WanModel):
        pass

    with pytest.raises(UnsupportedModel, match="WanFork is not a model that PSA knows"):
        identify(make_network(WanFork))


def test_a_flat_latent_is_no_video() -> None:
    from psa_pack.nodes.models.known import read_sequence
    from psa_pack.nodes.models.sequence import UnsupportedModel

    with pytest.raises(UnsupportedModel, match=r"latent has shape \(1, 16, 8, 8\)"):
        read_sequence(make_network(), {"x": latent(16, 8, 8), "context": latent(77, 4096)})


def test_a_replaced_forward_function_is_refused() -> None:
    from psa_pack.nodes.models.known import read_sequence
    from psa_pack.nodes.models.sequence import UnsupportedModel

    with pytest.raises(UnsupportedModel, match="another node has given WanModel a forward function"):
        read_sequence(make_network(), {"args": (latent(16, 3, 8, 8),)})


def test_a_sampler_that_hides_its_sigma_is_refused() -> None:
    from psa_pack.nodes.models.known import read_sigma
    from psa_pack.nodes.models.sequence import UnsupportedModel

    assert read_sigma({"sigmas": torch.tensor([0.5, 0.25])}) == 0.5  # the first video's, as ComfyUI's own nodes take
    with pytest.raises(UnsupportedModel, match="does not tell the model its noise level"):
        read_sigma({})


def test_a_compiled_shell_does_not_hide_the_model() -> None:
    from psa_pack.nodes.models.known import identify

    facts = identify(torch.compile(make_network(), backend="eager"))
    assert (facts.preset_family, len(facts.block_order)) == ("wan2.1_1.3b", 2)
    assert f"width {DIM} and 2 blocks" in str(facts.notes[0])

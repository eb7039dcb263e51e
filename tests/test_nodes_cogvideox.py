"""PSA Attention Patch on ComfyUI's own CogVideoX: joint attention over text and video, the text first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from psa_pack.psa_core import TokenLayout, psa_attention
from psa_pack.psa_core.config import PSAConfig
from psa_pack.psa_core.models.cogvideox import COGVIDEOX15_5B, COGVIDEOX_2B, COGVIDEOX_5B, Detected, detect_family
from psa_pack.psa_core.presets import load_presets
from psa_pack.psa_core.schedule import Schedule
from torch import Tensor

from conftest import ROOT
from runs import reasons, record
from tiny_cogvideox import BLOCKS, HEADS, TEXT, make_model, make_network, network_class, sample

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYWHERE = {"start_percent": 0.0, "min_tokens": 0, "backend": "reference"}
# Text to video and image to video (twice the channels) of 1.0 and 1.5, whose latents of 3 frames are padded to 4.
VARIANTS = {
    "5b t2v": ({}, (3, 8, 9)),
    "5b i2v": ({"in_channels": 32}, (3, 8, 9)),
    "2b t2v": ({"use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": True}, (3, 8, 9)),
    "1.5 5b t2v": ({"patch_size_t": 2}, (2, 8, 9)),
    "1.5 5b i2v": ({"patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 64}, (2, 8, 9)),
}


@pytest.fixture
def cogvideox(comfyui: Any) -> None:
    network_class()


def patch(model: Any, preset: str = "balanced", **inputs: Any) -> Any:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    return PSAAttentionPatch.execute(model, preset, **EVERYWHERE, **inputs).args[0]


def distance(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


@pytest.mark.parametrize("family", [COGVIDEOX_5B, COGVIDEOX15_5B], ids=lambda family: family.title)
def test_a_released_size_is_its_own_family(family: Any) -> None:
    assert detect_family(family.heads, family.blocks, family.patch_size[0]) == Detected(family, is_released=True)


@pytest.mark.usefixtures("cogvideox")
def test_2b_takes_the_presets_of_5b_and_says_so() -> None:
    from psa_pack.nodes.models.known import identify

    assert detect_family(30, 30, 1) == Detected(COGVIDEOX_2B, is_released=True)
    facts = identify(make_network(num_attention_heads=30, num_layers=30, device="meta"))
    assert facts.preset_family == "cogvideox_5b"
    assert list(map(str, facts.notes)) == ["CogVideoX-2B has no presets of its own; those of CogVideoX-5B are used"]


@pytest.mark.parametrize(
    ("size", "nearest"), [((2, 2, 1), COGVIDEOX_2B), ((40, 42, 1), COGVIDEOX_5B), ((2, 2, 2), COGVIDEOX15_5B)]
)
def test_an_unknown_size_goes_to_the_nearest_of_the_same_patch(size: tuple[int, int, int], nearest: Any) -> None:
    assert detect_family(*size) == Detected(nearest, is_released=False)


@pytest.mark.usefixtures("cogvideox")
def test_an_unknown_size_is_told() -> None:
    from psa_pack.nodes.models.known import identify

    (note,) = identify(make_network()).notes
    assert str(note) == (f"no released CogVideoX has {HEADS} heads and {BLOCKS} blocks; CogVideoX-2B is the nearest")


@pytest.mark.parametrize(
    ("family", "name", "levels", "edges", "key_block", "order", "dense"),
    [
        ("cogvideox1.5_5b", "official_balanced", (1, 2, 8, "skip"), (0.1, 0.15, 0.35), 32, "gilbert", 15 / 50),
        ("cogvideox_5b", "official_balanced", (1, 2, 8, "skip"), (0.1, 0.15, 0.35), 128, "raster", 15 / 50),
        ("cogvideox_5b", "official_4steps", (1, 2, 4, 8, "skip"), (0.05, 0.15, 0.25, 0.5), 128, "raster", 0),
    ],
)
def test_an_official_preset_has_the_official_numbers(
    family: str, name: str, levels: Any, edges: tuple[float, ...], key_block: int, order: Any, dense: float
) -> None:
    preset = load_presets(ROOT / "presets" / f"{family}.yaml")[name]
    assert preset.config == PSAConfig(
        selection="topk",
        levels=levels,
        ranges=tuple(zip((0, *edges), (*edges, 1), strict=True)),
        variance_term=False,
        order=order,
        query_block=128,
        key_block=key_block,
    )
    assert preset.schedule == Schedule(start_percent=dense)


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_weight_zero_is_dense_up_to_rounding(variant: str) -> None:
    changes, grid = VARIANTS[variant]
    model = make_model(**changes)
    patched = patch(model, error_weight=0.0)
    assert distance(sample(patched), sample(model)) < 1e-5
    run = record(patched)
    assert (run.sparse_calls, reasons(run), run.other_calls) == (4 * BLOCKS, {}, 0)
    assert run.tokens == TEXT + grid[0] * grid[1] * grid[2]
    assert run.density == 1.0


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("latent", [(1, 10, 14), (5, 15, 13), (2, 16, 18)])
@pytest.mark.parametrize("variant", ["5b t2v", "1.5 5b t2v"])
def test_every_resolution_and_length_works(variant: str, latent: tuple[int, int, int]) -> None:
    model = make_model(**VARIANTS[variant][0])
    patched = patch(model, error_weight=0.0)
    assert (
        distance(sample(patched, latent=latent, text=7, cfg=1.0), sample(model, latent=latent, text=7, cfg=1.0)) < 1e-5
    )
    assert record(patched).sparse_calls == 4 * BLOCKS


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("variant", VARIANTS)
def test_balanced_attends_as_the_reference_backend_does(variant: str) -> None:
    changes, grid = VARIANTS[variant]
    # So short a video needs another weight than the preset's to become sparse, in the first step as well.
    calls = watch(patch(make_model(**changes), error_weight=64.0))
    assert len(calls) == 4 * BLOCKS
    for q, k, v, dense, out, config in calls:
        layout = TokenLayout(grid, video_start=TEXT)
        expected = psa_attention(q, k, v, layout=layout, config=config, backend="reference")
        assert torch.equal(out, expected.transpose(1, 2).flatten(2))
        # The text attends everything exactly, and the video does not.
        assert distance(out[:, :TEXT], dense[:, :TEXT]) < 1e-5
        assert distance(out[:, TEXT:], dense[:, TEXT:]) > 1e-4


def watch(patched: Any) -> list[tuple[Any, ...]]:
    """Sample once; return q, k, v as [B, H, N, D], the dense and the patch's output, and the config of every call."""
    from psa_pack.nodes.override import AttentionOverride
    from psa_pack.nodes.session import Session

    calls, configs = [], []
    original, attend = AttentionOverride.__call__, Session.attend

    def note(self: Any, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, config: Any, *others: Any) -> Any:
        configs.append(config)
        return attend(self, q, k, v, layout, config, *others)

    def spy(self: Any, func: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        out = original(self, func, q, k, v, **kwargs)
        split = (tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (q, k, v))
        calls.append((*split, func(q, k, v, **kwargs), out, configs[-1]))
        return out

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(AttentionOverride, "__call__", spy)
        monkeypatch.setattr(Session, "attend", note)
        sample(patched)
    return calls


@pytest.mark.usefixtures("cogvideox")
def test_blocks_are_told_apart_by_counting() -> None:
    model = make_model(num_layers=3)
    patched = patch(model, error_weight=1.0, dense_blocks="0, -1")
    sample(patched)
    assert (record(patched).sparse_calls, reasons(record(patched))) == (4, {"in dense_blocks": 8})
    everything = patch(model, error_weight=1.0, dense_blocks="0-2")
    assert torch.equal(sample(everything), sample(model))


@pytest.mark.usefixtures("cogvideox")
def test_a_subclass_stays_dense() -> None:
    from psa_pack.nodes.models.known import identify
    from psa_pack.nodes.models.sequence import UnsupportedModel

    network = make_network()
    network.__class__ = type("OtherCogVideoX", (network_class(),), {})
    with pytest.raises(UnsupportedModel, match="OtherCogVideoX is not a model that PSA knows"):
        identify(network)


@pytest.mark.usefixtures("cogvideox")
def test_the_named_presets_are_those_of_its_family() -> None:
    patched = patch(make_model(patch_size_t=2), "fast")
    sample(patched, cfg=1.0)
    assert record(patched).title == "cogvideox1.5_5b fast"


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("name", ["official_balanced", "official_4steps", "four_steps"])
def test_a_preset_of_the_loader_runs(name: str) -> None:
    chosen = load_presets(ROOT / "presets/cogvideox_5b.yaml")[name]
    patched = patch(make_model(), custom_preset=chosen)
    assert sample(patched).isfinite().all()
    assert record(patched).title == f"cogvideox_5b {name}"
    assert record(patched).sparse_calls == 4 * BLOCKS


@pytest.mark.usefixtures("cogvideox")
def test_a_probe_tells_the_blocks_and_leaves_the_latent() -> None:
    from psa_pack.nodes.attention_patch import PROBE_KEY
    from psa_pack.nodes.probe import Probe

    patched = patch(make_model(), error_weight=0.3)
    plain = sample(patched)
    probed = patched.clone()
    probe = Probe(PSAConfig(error_weight=0.3), 1.0)
    probed.model_options["transformer_options"][PROBE_KEY] = probe
    assert torch.equal(sample(probed), plain)
    assert len(probe.calls) == record(patched).sparse_calls > 0
    assert [call.block for call in probe.calls[:BLOCKS]] == list(range(BLOCKS))
    assert all(0 < call.errors[0] < call.errors[-1] < 1 for call in probe.calls)

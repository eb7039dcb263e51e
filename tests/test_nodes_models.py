"""Where the video is among a model's tokens, checked against what ComfyUI's own models feed their attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_wan import DIM, make_network

pytestmark = pytest.mark.usefixtures("comfyui")


def latent(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def watch(network: torch.nn.Module, x: Tensor, **arguments: Any) -> tuple[Any, Tensor]:
    """Run a network; return the sequence as PSA reads it, and the tokens that enter the first block."""
    from comfy.patcher_extension import WrappersMP
    from psa_pack.nodes.override import name_arguments
    from psa_pack.nodes.video_models import read_sequence

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


def test_the_camera_model_is_known_too() -> None:
    from comfy.ldm.wan.model import CameraWanModel

    network = make_network(CameraWanModel, model_type="camera_2.2")
    sequence, entered = watch(network, latent(16, 3, 16, 18))
    assert sequence.layout.tokens == entered.shape[1] == sequence.layout.video_tokens


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    from comfy.ldm.wan.model import VaceWanModel
    from psa_pack.nodes.video_models import UnsupportedModel, identify

    network = make_network(VaceWanModel, model_type="vace", vace_layers=1, vace_in_dim=16)
    with pytest.raises(UnsupportedModel, match="VaceWanModel is not a model that PSA knows"):
        identify(network)


def test_a_flat_latent_is_no_video() -> None:
    from psa_pack.nodes.video_models import UnsupportedModel, read_sequence

    with pytest.raises(UnsupportedModel, match=r"latent has shape \(1, 16, 8, 8\)"):
        read_sequence(make_network(), {"x": latent(16, 8, 8), "context": latent(77, 4096)})


def test_a_replaced_forward_function_is_refused() -> None:
    from psa_pack.nodes.video_models import UnsupportedModel, read_sequence

    with pytest.raises(UnsupportedModel, match="another node has given WanModel a forward function"):
        read_sequence(make_network(), {"args": (latent(16, 3, 8, 8),)})


def test_a_sampler_that_hides_its_sigma_is_refused() -> None:
    from psa_pack.nodes.video_models import UnsupportedModel, read_sigma

    assert read_sigma({"sigmas": torch.tensor([0.5, 0.5])}) == 0.5
    with pytest.raises(UnsupportedModel, match="does not tell the model its noise level"):
        read_sigma({})


def test_a_compiled_shell_does_not_hide_the_model() -> None:
    from psa_pack.nodes.video_models import identify

    facts = identify(torch.compile(make_network(), backend="eager"))
    assert (facts.preset_family, facts.blocks) == ("wan2.1_1.3b", 2)
    assert f"width {DIM} and 2 blocks" in facts.note

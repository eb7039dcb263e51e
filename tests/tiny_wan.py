"""A Wan model of random weights in a real ComfyUI: small enough to sample in a fraction of a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIM = 256
BLOCKS = 2
LATENT = (3, 16, 18)
TOKENS = 3 * 8 * 9


def make_model(**changes: Any) -> Any:
    """A ModelPatcher around a text-to-video WanModel, loaded as ComfyUI loads a checkpoint."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(make_network(**changes).state_dict(), {})
    assert model is not None
    return model


def make_network(cls: type | None = None, **changes: Any) -> torch.nn.Module:
    """The network alone, seeded; ``cls`` may be another class of Wan than WanModel."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    settings = {
        "model_type": "t2v",
        "dim": DIM,
        "ffn_dim": 512,
        "num_heads": DIM // 128,
        "num_layers": BLOCKS,
        "device": "cpu",
        "dtype": torch.float32,
        "operations": comfy.ops.disable_weight_init,
    }
    network = (cls or WanModel)(**(settings | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
    return network


def sample(
    model: Any,
    *,
    latent: tuple[int, int, int] = LATENT,
    steps: int = 4,
    cfg: float = 6.0,
    context: int = 77,
    negative_context: int = 77,
    start_step: int | None = None,
    last_step: int | None = None,
    channels: int = 16,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """Sample a latent from a fixed seed, through ComfyUI's own sampling."""
    import comfy.sample

    empty = torch.zeros(1, channels, *latent)
    generator = torch.Generator().manual_seed(1)
    positive, negative = (
        [[torch.randn(1, length, 4096, generator=generator), {}]] for length in (context, negative_context)
    )
    return comfy.sample.sample(
        model,
        # As ComfyUI's prepare_noise, whose generator all threads share.
        torch.randn(empty.shape, generator=torch.Generator().manual_seed(2)),
        steps,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        empty,
        start_step=start_step,
        last_step=last_step,
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=2,
    )

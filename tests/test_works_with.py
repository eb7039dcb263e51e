"""PSA beside ComfyUI's own nodes and weight formats: with everything at level 1 the result is that without PSA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from test_nodes_patch import EVERYWHERE, SPARSE, distance, patch, record
from tiny_wan import BLOCKS, DIM, TOKENS, make_model, make_network, sample

EXACT = {**EVERYWHERE, "error_weight": 0.0}
STEPS = 10
FRAMES = (5, 16, 18)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


def lora(model: Any) -> Any:
    import comfy.sd

    generator = torch.Generator().manual_seed(4)
    name = "diffusion_model.blocks.{}.self_attn.{}.lora_{}.weight"
    weights = {
        name.format(block, part, side): torch.randn(shape, generator=generator) * 0.1
        for block in range(BLOCKS)
        for part in "qkv"
        for side, shape in (("A", (4, DIM)), ("B", (DIM, 4)))
    }
    return comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)[0]


def model_sampling_sd3(model: Any) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, 5.0)[0]


def cfg_zero_star(model: Any) -> Any:
    from comfy_extras.nodes_cfg import CFGZeroStar

    return CFGZeroStar.execute(model).args[0]


def skip_layer_guidance(model: Any) -> Any:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers="0").args[0]


def normalized_attention_guidance(model: Any) -> Any:
    nodes = pytest.importorskip(
        "comfy_extras.nodes_nag", reason="this ComfyUI has no NAG of its own; COMFYUI_PATH may name a newer one"
    )
    return nodes.NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]


def easy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 10.0, 0.1, 0.95, False).args[0]


def lazy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 10.0, 0.1, 0.95, False).args[0]


def context_windows(model: Any) -> Any:
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    return WanContextWindowsManualNode.execute(model, 9, 5, "standard_static", 1, False, "pyramid").args[0]


NODES = [
    lora,
    model_sampling_sd3,
    cfg_zero_star,
    skip_layer_guidance,
    normalized_attention_guidance,
    easy_cache,
    lazy_cache,
    context_windows,
]


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_a_node_does_its_work_beside_psa_in_either_order(
    model: Any, node: Callable[[Any], Any], patched_first: bool
) -> None:
    run = {"steps": STEPS, "latent": FRAMES}
    expected = sample(node(model), **run)
    assert distance(expected, sample(model, **run)) > 1e-4  # or it did nothing
    both = node(patch(model, **EXACT)) if patched_first else patch(node(model), **EXACT)
    assert distance(sample(both, **run), expected) < 1e-5
    assert record(both).sparse_calls > 0
    assert record(both).dense_calls == {}


def test_context_windows_have_a_layout_of_their_own(model: Any) -> None:
    both = context_windows(patch(model, **SPARSE))
    sample(both, latent=FRAMES)
    assert record(both).tokens == TOKENS  # a window is as long as three of the five latent frames
    assert record(both).sparse_calls > 4 * BLOCKS


def test_float8_weights(comfyui: Path) -> None:
    import comfy.sd

    weights = make_network().state_dict()
    model = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float8_e4m3fn})
    assert model.model.diffusion_model.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    seen = set()

    def note(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        seen.update(tensor.dtype for tensor in args[:3])
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = note
    expected = sample(model)
    assert seen and seen <= {
        torch.float32,
        torch.bfloat16,
        torch.float16,
    }  # the weights' format stays in the linear layers
    patched = patch(model, **EXACT)
    assert distance(sample(patched), expected) < 1e-5
    assert record(patched).sparse_calls == 4 * BLOCKS


def test_two_experts_share_one_schedule(model: Any) -> None:
    # As Wan 2.2 A14B: noise for the first expert only, the second goes on where it stopped.
    high, low = (patch(expert, **SPARSE | {"start_percent": 0.3}) for expert in (model, lora(model)))
    sample(high, steps=STEPS, cfg=1.0, start_step=0, last_step=5)
    sample(low, steps=STEPS, cfg=1.0, start_step=5, last_step=STEPS)
    assert (record(high).steps, record(high).sparse_steps) == (5, 2)
    assert (record(low).steps, record(low).sparse_steps) == (5, 5)

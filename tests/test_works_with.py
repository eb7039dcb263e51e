"""PSA beside ComfyUI's own nodes and weight formats: with everything at level 1 the result is that without PSA."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import record
from test_nodes_patch import EVERYWHERE, OVERRIDE, SPARSE, distance, patch
from tiny_wan import BLOCKS, DIM, TOKENS, make_model, make_network, sample

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {**EVERYWHERE, "error_weight": 0.0}
STEPS = 10
FRAMES = (5, 16, 18)


@pytest.fixture
def model(comfyui: Path) -> Any:
    """One for each test: caches take their limits from the sampling that the run before left in the network."""
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
    """As NAG nodes for Wan do it: cross attention with a forward of its own, pushed away from a second text."""
    import comfy.ldm.wan.model as wan

    avoided = torch.randn(1, 77, DIM, generator=torch.Generator().manual_seed(5))

    def guided(attention: torch.nn.Module) -> Callable[..., Tensor]:
        def forward(x: Tensor, context: Tensor, transformer_options: Any = None, **kwargs: Any) -> Tensor:
            q = attention.norm_q(attention.q(x))

            def attend(text: Tensor) -> Tensor:
                k, v = attention.norm_k(attention.k(text)), attention.v(text)
                return wan.optimized_attention(
                    q, k, v, heads=attention.num_heads, transformer_options=transformer_options
                )

            return attention.o(1.5 * attend(context) - 0.5 * attend(avoided.expand(len(x), -1, -1)))

        return forward

    patched = model.clone()
    for index, block in enumerate(model.get_model_object("diffusion_model").blocks):
        patched.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", guided(block.cross_attn))
    return patched


def comfyuis_own_nag(model: Any) -> Any:
    """Wan in ComfyUI 0.33 has no place for it, so that it does nothing there."""
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
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode as Node

    newer = {"freenoise": False} if "freenoise" in inspect.signature(Node.execute).parameters else {}
    return Node.execute(model, 9, 5, "standard_static", 1, False, "pyramid", **newer).args[0]


NODES = [
    lora,
    model_sampling_sd3,
    cfg_zero_star,
    skip_layer_guidance,
    normalized_attention_guidance,
    comfyuis_own_nag,
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
    if node is not comfyuis_own_nag:
        assert distance(expected, sample(model, **run)) > 1e-4  # or it did nothing
    both = node(patch(model, **EXACT)) if patched_first else patch(node(model), **EXACT)
    assert distance(sample(both, **run), expected) < 1e-5
    assert record(both).sparse_calls > 0
    assert record(both).dense_calls == {}


def test_context_windows_have_a_layout_of_their_own(model: Any) -> None:
    both = context_windows(patch(model, **SPARSE))
    sample(both, latent=FRAMES)
    lengths = {call.tokens for call in record(both).calls}
    with_one_before = TOKENS // 3 * 4  # newer ComfyUI shows a later window the frame before it, too
    assert lengths - {with_one_before} == {TOKENS}  # a window is as long as three of the five latent frames
    assert record(both).sparse_calls > 4 * BLOCKS


def attention_dtypes(model: Any) -> set[torch.dtype]:
    """Sample; what the attention of the model is given."""
    seen = set()

    def note(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        seen.update(tensor.dtype for tensor in args[:3])
        return func(*args, **kwargs)

    watched = model.clone()
    watched.model_options["transformer_options"][OVERRIDE] = note
    sample(watched)
    return seen


def float8(weights: dict[str, Tensor]) -> Any:
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float8_e4m3fn})
    assert model.model.diffusion_model.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    return model


def scaled_float8(weights: dict[str, Tensor]) -> Any:
    """As the fp8_scaled files of Wan 2.2: every linear layer in float8, with a factor beside it."""
    import comfy.sd

    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        scaled[name] = weight
        if weight.dim() == 2 and name.endswith(".weight"):
            factor = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            scaled[name] = (weight / factor).to(torch.float8_e4m3fn)
            scaled[f"{name.removesuffix('.weight')}.scale_weight"] = factor
    return comfy.sd.load_diffusion_model_state_dict(scaled)


def gguf(weights: dict[str, Tensor]) -> Any:
    """As GGUF loaders do: layers of their own keep whole numbers, and make weights of them when they are called."""
    import comfy.ops
    import comfy.sd

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
            weight = state[f"{prefix}weight"]
            factor = weight.abs().amax(dim=1, keepdim=True) / 127
            self.quantized, self.factor = (weight / factor).round().to(torch.int8), factor
            super()._load_from_state_dict(state, prefix, *args)
            self.weight = torch.nn.Parameter(self.quantized, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            weight = (self.quantized * self.factor).to(x.dtype)
            return torch.nn.functional.linear(x, weight, self.bias.to(x.dtype))

    operations = type("GGUFOperations", (comfy.ops.manual_cast,), {"Linear": Linear})
    return comfy.sd.load_diffusion_model_state_dict(weights, {"custom_operations": operations})


@pytest.mark.parametrize("quantize", [float8, scaled_float8, gguf])
def test_quantized_weights_stay_in_the_linear_layers(model: Any, quantize: Callable[[dict[str, Tensor]], Any]) -> None:
    quantized = quantize(make_network().state_dict())
    expected = sample(quantized)
    assert distance(expected, sample(model)) > 1e-3  # or nothing was quantized
    assert attention_dtypes(quantized) <= {torch.float32, torch.bfloat16, torch.float16}
    patched = patch(quantized, **EXACT)
    assert distance(sample(patched), expected) < 1e-5
    assert record(patched).sparse_calls == 4 * BLOCKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_made_of_quantized_weights(comfyui: Path, dtype: torch.dtype) -> None:
    model = gguf(make_network().state_dict())
    precise = sample(model)
    model.set_model_compute_dtype(dtype)
    assert attention_dtypes(model) == {dtype}
    patched = patch(model, **EXACT)
    assert distance(sample(patched), precise) <= 2 * distance(sample(model), precise)
    assert record(patched).sparse_calls == 4 * BLOCKS


def test_weights_that_stay_in_main_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --lowvram and --novram: the layers fetch their weights, and a LoRA with them, when they are called."""
    from comfy.model_patcher import ModelPatcher

    expected = sample(lora(model))
    load = ModelPatcher.load

    def load_little(self: Any, device_to: Any = None, lowvram_model_memory: int = 0, **options: Any) -> None:
        load(self, device_to, lowvram_model_memory=1, **options | {"full_load": False})

    monkeypatch.setattr(ModelPatcher, "load", load_little)
    patched = patch(lora(make_model()), **EXACT)
    assert distance(sample(patched), expected) < 1e-5
    assert patched.model.model_lowvram
    assert record(patched).sparse_calls == 4 * BLOCKS


class Answered(Counter[str]):
    """How many video self-attention calls another node's attention has answered."""

    def wrap(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self["video"] += q.shape == k.shape
            return func(q, k, *args, **kwargs)

        return attention


def attention_backend(model: Any, answered: Answered, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's Model Attention Backend, with an attention that counts; it drops whatever override was there."""
    import comfy.ldm.modules.attention as attention
    from comfy_extras import nodes_model_advanced

    if not hasattr(nodes_model_advanced, "ModelAttentionBackend"):
        pytest.skip("this ComfyUI has no Model Attention Backend; COMFYUI_PATH may name a newer one")
    counting = answered.wrap(attention.attention_pytorch)
    monkeypatch.setattr(attention, "get_attention_function", lambda name, default=None: counting)
    return nodes_model_advanced.ModelAttentionBackend().patch(model, "pytorch attention")[0]


def sage(model: Any, answered: Answered, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As KJNodes' Patch Sage Attention: an override that never looks whether there is another."""
    patched = model.clone()
    patched.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: answered.wrap(func)(
        *args, **kwargs
    )
    return patched


def sparse_attention(model: Any, answered: Answered, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's own Model Sparse Attention, where it is, with a kernel for this device that counts."""
    nodes = pytest.importorskip(
        "comfy_extras.nodes_sparse_attention",
        reason="this ComfyUI has no Model Sparse Attention; COMFYUI_PATH may name a newer one",
    )

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:  # [B, N, H, D]
        answered["video"] += 1
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    monkeypatch.setattr(nodes, "_ineligible", lambda q, k, v, head_dim: None if q.shape == k.shape else "cross")
    monkeypatch.setattr(nodes.ck, "sol_attn", kernel, raising=False)
    selection = {"selection": "sol-attn", "tau": 1.3}
    return nodes.BlockSparseAttention.execute(model, selection, 0.0, 1.0, min_tokens=0).args[0]


def sparse_attention_that_comes_back(model: Any, answered: Answered, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As Model Sparse Attention does: chained, and on top again before every step if another override is there."""
    from comfy.patcher_extension import CallbacksMP

    installed = []

    def install(options: dict[str, Any]) -> None:
        if (current := options.get(OVERRIDE)) in installed:
            return

        def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return answered.wrap(func if current is None else partial(current, func))(*args, **kwargs)

        installed.append(override)
        options[OVERRIDE] = override

    def prepare(model: Any, timestep: Any, model_options: Any = None, *others: Any) -> None:
        if model_options is not None:
            install(model_options["transformer_options"])

    patched = model.clone()
    install(patched.model_options["transformer_options"])
    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "sparse", prepare)
    return patched


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize(
    "node",
    [attention_backend, sage, sparse_attention, sparse_attention_that_comes_back],
    ids=lambda node: node.__name__,
)
def test_each_call_has_one_attention_and_the_log_says_whose(
    model: Any,
    node: Callable[..., Any],
    patched_first: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = EXACT | {"start_percent": 0.5}
    answered = Answered()
    if patched_first:
        both = node(patch(model, **settings), answered, monkeypatch)
    else:
        both = patch(node(model, answered, monkeypatch), **settings)
    with caplog.at_level(logging.INFO):
        out = sample(both)
    assert answered["video"] == 2 * BLOCKS  # in the two steps that PSA leaves dense
    assert record(both).sparse_calls == 2 * BLOCKS
    left = f"{2 * BLOCKS} dense calls ({2 * BLOCKS} before start_percent 0.5), left to the attention of "
    assert left in caplog.text
    # The other's kernel computes in another order, and the real Model Sparse Attention in half precision.
    assert distance(out, sample(model)) < (1e-2 if node is sparse_attention else 1e-5)


def test_two_experts_share_one_schedule(model: Any) -> None:
    # As Wan 2.2 A14B: noise for the first expert only, the second goes on where it stopped.
    high, low = (patch(expert, **SPARSE | {"start_percent": 0.3}) for expert in (model, lora(model)))
    sample(high, steps=STEPS, cfg=1.0, start_step=0, last_step=5)
    sample(low, steps=STEPS, cfg=1.0, start_step=5, last_step=STEPS)
    assert (record(high).steps, record(high).sparse_steps) == (5, 2)
    assert (record(low).steps, record(low).sparse_steps) == (5, 5)

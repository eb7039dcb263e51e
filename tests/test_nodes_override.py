"""How the override reads ComfyUI's attention calls, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import reasons

GRID = (3, 8, 9)
TOKENS = 3 * 8 * 9
HEADS = 2


@pytest.fixture
def call(comfyui: Path) -> Callable[..., tuple[Tensor, Any]]:
    """Calls attention through an override whose session keeps everything exact; returns the output and the record."""
    from comfy.ldm.modules.attention import attention_pytorch
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.models.sequence import BlockOrder, Stack, VideoSequence
    from psa_pack.nodes.override import AttentionOverride
    from psa_pack.nodes.session import Session
    from psa_pack.psa_core import PSAConfig, TokenLayout
    from psa_pack.psa_core.presets import Preset
    from psa_pack.psa_core.schedule import Schedule

    def run(
        *tensors: Any,
        previous: Callable[..., Tensor] | None = None,
        context: int = 77,
        dense_blocks: frozenset[int] = frozenset(),
        options: dict[str, Any] | None = None,
        attention: Callable[..., Tensor] = attention_pytorch,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        preset = Preset("exact", "test", "", "", PSAConfig(error_weight=0.0), Schedule())
        session = Session(PatchSettings("test", (), preset, dense_blocks, "reference", False), lambda p: 1 - p, print)
        layout = TokenLayout(GRID)
        session.begin_model_call(0.5, layout)
        override = AttentionOverride(
            session, VideoSequence(layout, frozenset({context}), BlockOrder((Stack("double", 2),))), previous
        )
        options = {**(options or {}), "optimized_attention_override": override}
        out = attention(*tensors, heads=HEADS, transformer_options=options, **kwargs)
        return out, session.finish("finished")

    return run


def flat(seed: int, tokens: int = TOKENS, dim: int = 128) -> Tensor:
    return torch.randn(2, tokens, HEADS * dim, generator=torch.Generator().manual_seed(seed))


def headed(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)


QKV = tuple(map(flat, range(3)))


def exact(scale: float | None = None) -> Tensor:
    q, k, v = map(headed, QKV)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_self_attention_goes_sparse_in_the_usual_layout(call: Callable[..., Any], scale: float | None) -> None:
    out, record = call(*QKV, **({} if scale is None else {"scale": scale}))
    assert record.sparse_calls == 1
    assert out.is_contiguous()
    torch.testing.assert_close(out, exact(scale))


@pytest.mark.parametrize("skip_output", [False, True])
def test_heads_first_in_and_out(call: Callable[..., Any], skip_output: bool) -> None:
    out, record = call(*map(headed, QKV), skip_reshape=True, skip_output_reshape=skip_output)
    assert record.sparse_calls == 1
    torch.testing.assert_close(out, headed(exact()) if skip_output else exact())


def test_heads_first_output_from_the_usual_input(call: Callable[..., Any]) -> None:
    out, record = call(*QKV, skip_output_reshape=True)
    assert record.sparse_calls == 1
    torch.testing.assert_close(out, headed(exact()))


@pytest.mark.parametrize(
    "tensors",
    [
        (flat(0), flat(1, 77), flat(2, 77)),  # cross attention
        (flat(0, 77), flat(1, 77), flat(2, 77)),  # self-attention of something else
        (flat(0, 77), flat(1), flat(2)),  # something else looking at the video
    ],
)
def test_other_attention_is_left_alone(call: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    from comfy.ldm.modules.attention import attention_pytorch

    out, record = call(*tensors)
    assert (record.sparse_calls, record.other_calls) == (0, 1)
    assert torch.equal(out, attention_pytorch(*tensors, heads=HEADS))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask": torch.zeros(TOKENS, TOKENS)}, "the call has a mask"),
        ({"attn_precision": torch.float64}, "the call asks for attention in torch.float64"),
        ({"window": 3}, "the call has arguments that PSA does not know (window)"),
        ({"window": False}, "the call has arguments that PSA does not know (window)"),
        ({"context": TOKENS}, "context as long as the video"),
        ({"options": {"block_index": 1}, "dense_blocks": frozenset({1})}, "in dense_blocks"),
        ({"dense_blocks": frozenset({1})}, "in a block that ComfyUI does not name"),
    ],
)
def test_a_call_that_psa_must_not_take_stays_dense(call: Callable[..., Any], changes: Any, reason: str) -> None:
    seen = []

    def previous(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return torch.zeros(1)

    out, record = call(*QKV, previous=previous, **changes)
    assert torch.equal(out, torch.zeros(1))
    assert [reason in key for key in reasons(record)] == [True]
    (args, kwargs), arguments = seen[0], {key: changes[key] for key in changes.keys() - _OWN}
    assert all(given is tensor for given, tensor in zip(args, QKV, strict=True))
    assert kwargs.keys() == {"heads", "transformer_options", "_inside_attn_wrapper", *arguments}


_OWN = {"context", "options", "dense_blocks"}


def test_another_block_than_the_dense_ones_goes_sparse(call: Callable[..., Any]) -> None:
    _, record = call(*QKV, options={"block_index": 0}, dense_blocks=frozenset({1}))
    assert record.sparse_calls == 1


def test_an_odd_head_dim_stays_dense(call: Callable[..., Any]) -> None:
    tensors = tuple(flat(seed, dim=80) for seed in range(3))
    _, record = call(*tensors)
    assert reasons(record) == {"head dim 80 is not one of 64, 128": 1}


def test_precision_above_the_inputs_own_stays_dense(call: Callable[..., Any]) -> None:
    half = tuple(tensor.bfloat16() for tensor in QKV)
    _, record = call(*half, attn_precision=torch.float32)
    assert reasons(record) == {"the call asks for attention in torch.float32": 1}
    _, record = call(*half, attn_precision=torch.bfloat16)
    assert record.sparse_calls == 1


@pytest.mark.parametrize("needing", range(3))
def test_only_what_needs_gradients_stays_dense(call: Callable[..., Any], needing: int) -> None:
    tensors = [tensor.clone() for tensor in QKV]
    tensors[needing].requires_grad_()
    _, record = call(*tensors)
    assert reasons(record) == {"the call needs gradients, which PSA does not compute": 1}
    with torch.no_grad():
        _, record = call(*tensors)
    assert record.sparse_calls == 1


def test_calls_without_a_name_are_told_apart_by_counting(call: Callable[..., Any]) -> None:
    """So that PSA Report shows a row for each block, whichever way it was computed."""

    def three_times(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
        override = kwargs["transformer_options"]["optimized_attention_override"]
        for mask in (None, torch.zeros(TOKENS, TOKENS), None):
            out: Tensor = override(lambda *args, **kwargs: q, q, k, v, heads, mask, **kwargs)
        return out

    _, record = call(*QKV, attention=three_times)
    assert [(call.block, call.density is None) for call in record.calls] == [(0, False), (1, True), (2, False)]


def test_replacements_of_other_kinds_and_blocks_stay(comfyui: Path) -> None:
    from psa_pack.nodes.models.sequence import BlockOrder, Stack, VideoSequence
    from psa_pack.nodes.override import AttentionOverride
    from psa_pack.psa_core import TokenLayout

    def replacement(arguments: Any, extra: Any) -> Any:
        return extra["original_block"](arguments)

    dit = {("double_block", 7): replacement, ("single_block", 1): replacement}
    options = {"patches_replace": {"attn2": {("middle", 0): replacement}, "dit": dit}}
    before = {kind: dict(entries) for kind, entries in options["patches_replace"].items()}
    order = BlockOrder((Stack("double", 2, replace_key="double_block"), Stack("side", 1)))
    sequence = VideoSequence(TokenLayout(GRID), frozenset(), order)
    session: Any = SimpleNamespace(needs_blocks=True)
    entries = AttentionOverride(session, sequence, None).entries(options)["patches_replace"]
    assert entries["attn2"] == before["attn2"]
    assert {key: entries["dit"][key] for key in dit} == before["dit"]
    assert entries["dit"].keys() == {*dit, ("double_block", 0), ("double_block", 1)}
    assert options["patches_replace"] == before


def test_two_stacks_that_both_count_from_0_are_told_apart(comfyui: Path) -> None:
    """As HunyuanVideo's: a call says its stack and its index there, or a replacement tells."""
    from psa_pack.nodes.models.sequence import Block, BlockOrder, Stack

    order = BlockOrder((Stack("double", 20, "double_block"), Stack("single", 40, "single_block")))
    assert [order.number(block) for block in order] == list(range(60)) and len(order) == 60
    for options, block in (
        ({"block_type": "double", "block_index": 3}, Block("double", 3)),
        ({"block_type": "single", "block_index": 3}, Block("single", 3)),
        ({"block_index": 3}, Block("double", 3)),
        ({"block_type": "refiner", "block_index": 3}, None),
        ({"block_type": "double", "block_index": 20}, None),
        ({"block_type": "single"}, None),
        ({}, None),
    ):
        assert order.named_in(options) == block
    keys = order.by_replace_key()
    assert len(keys) == 60
    assert order.number(keys["single_block", 3]) == 23
    assert order.number(keys["double_block", 3]) == 3


def test_tensor_containers_go_to_the_override_that_takes_them(call: Callable[..., Any]) -> None:
    attention = pytest.importorskip("comfy.ldm.modules.attention")
    if not hasattr(attention, "AttentionTensorContainer"):
        pytest.skip("this ComfyUI has no attention tensor containers")
    taken = []

    def previous(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the container function should have been called")

    def container_function(q: Any, k: Any, v: Any, **kwargs: Any) -> Tensor:
        taken.extend(container.take() for container in (q, k, v))
        return torch.zeros(1)

    previous.container_function = container_function  # type: ignore[attr-defined]
    out, record = call(*map(attention.AttentionTensorContainer, QKV), previous=previous)
    assert torch.equal(out, torch.zeros(1))
    assert all(given is tensor for given, tensor in zip(taken, QKV, strict=True))
    assert record.sparse_calls == 0


def test_tensor_containers_reach_psa_opened_where_nobody_else_takes_them(call: Callable[..., Any]) -> None:
    attention = pytest.importorskip("comfy.ldm.modules.attention")
    if not hasattr(attention, "AttentionTensorContainer"):
        pytest.skip("this ComfyUI has no attention tensor containers")
    out, record = call(*map(attention.AttentionTensorContainer, QKV))
    assert record.sparse_calls == 1
    torch.testing.assert_close(out, exact())


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("comfy_extras.nodes_sparse_attention", "comfy_extras.nodes_sparse_attention"),
        ("/opt/ComfyUI/comfy_extras/nodes_sparse_attention", "nodes_sparse_attention"),
        ("C:\\ComfyUI\\custom_nodes\\some-pack.nodes.attention", "some-pack.nodes.attention"),
    ],
)
def test_an_override_is_named_by_its_module_without_the_users_folders(comfyui: Path, module: str, owner: str) -> None:
    from psa_pack.nodes.override import owner_of

    def override(func: Callable[..., Tensor], *args: Any) -> Tensor:
        return func(*args)

    override.__module__ = module
    assert owner_of(override) == owner
    assert owner_of(type("Override", (), {"__module__": module})()) == owner
    assert owner_of(None) == ""


def test_entries_are_replaced_and_put_back(comfyui: Path) -> None:
    from psa_pack.nodes.override import replaced

    options = {"a": 1, "b": 2}
    with pytest.raises(KeyError), replaced(options, {"b": 3, "c": 4}):
        assert options == {"a": 1, "b": 3, "c": 4}
        raise KeyError
    assert options == {"a": 1, "b": 2}


def test_arguments_are_named_wherever_they_stand(comfyui: Path) -> None:
    from psa_pack.nodes.override import name_arguments

    def forward(x: int, context: int, clip_fea: int = 0, transformer_options: int = 0, **kwargs: int) -> None: ...

    named = name_arguments(forward, (1, 2), {"transformer_options": 3, "reference_latent": 4})
    assert named == {"x": 1, "context": 2, "transformer_options": 3, "reference_latent": 4}
    with pytest.raises(TypeError):
        name_arguments(forward, (1,), {})

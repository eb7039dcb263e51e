"""A run goes on whatever other nodes do to its options, whatever cannot be said, and whoever wants gradients."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import reasons, record
from test_nodes_patch import EVERYWHERE, OVERRIDE, SPARSE, patch
from tiny_wan import BLOCKS, make_model, make_network, sample

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


# Copies of the options


def copy_in_post_cfg(model: Any, copied: Callable[[Any], Any]) -> None:
    def post_cfg(args: dict[str, Any]) -> Any:
        copied(args["model_options"])
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(post_cfg)


def copy_in_pre_cfg(model: Any, copied: Callable[[Any], Any]) -> None:
    def pre_cfg(args: dict[str, Any]) -> Any:
        copied(args["model_options"])
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(pre_cfg)


def call_with_a_copy(model: Any, copied: Callable[[Any], Any]) -> None:
    def wrapper(apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
        conditions = args["c"] | {"transformer_options": copied(args["c"]["transformer_options"])}
        return apply_model(args["input"], args["timestep"], **conditions)

    model.set_model_unet_function_wrapper(wrapper)


def copy_in_a_block(model: Any, copied: Callable[[Any], Any]) -> None:
    """Where the override of this call is in the options as well."""

    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"](args | {"transformer_options": copied(args["transformer_options"])})

    model.set_model_patch_replace(replacement, "dit", "double_block", 0)


def each_copied(options: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.copy(value) for key, value in options.items()}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, each_copied], ids=["deep", "shallow", "one by one"])
@pytest.mark.parametrize("where", [copy_in_post_cfg, copy_in_pre_cfg, call_with_a_copy, copy_in_a_block])
def test_a_copy_of_the_options_is_of_the_same_run(
    model: Any, where: Callable[..., None], copied: Callable[[Any], Any]
) -> None:
    settings = SPARSE | {"start_percent": 0.5, "dense_blocks": "1"}
    plain = patch(model, **settings)
    expected = sample(plain)
    source, copies = model.clone(), []

    def remembered(options: Any) -> Any:
        copies.append(copied(options))
        return copies[-1]

    where(source, remembered)
    patched = patch(source, **settings)
    assert torch.equal(sample(patched), expected)
    assert len(copies) >= 4
    assert reasons(record(patched)) == reasons(record(plain))
    assert (record(patched).sparse_calls, record(patched).steps) == (2, 4)


def test_a_probe_is_copied_with_the_options_of_its_run(model: Any) -> None:
    from psa_pack.nodes.attention_patch import PROBE_KEY
    from psa_pack.nodes.probe import Probe

    patched = patch(model, **SPARSE)
    probe = Probe(patch_settings(patched).preset.config, 1.0)
    patched.model_options["transformer_options"][PROBE_KEY] = probe
    copied = copy.deepcopy(patched.model_options)
    assert copied["transformer_options"][PROBE_KEY] is probe


def patch_settings(patched: Any) -> Any:
    from psa_pack.nodes.attention_patch import AttentionPatch

    return AttentionPatch.find(patched).settings


def test_options_are_pickled_in_the_middle_of_a_run(model: Any) -> None:
    """Into another process goes the patch, with what it remembers, but not the run."""
    source, pickled = model.clone(), []
    copy_in_a_block(source, lambda options: pickled.append(pickle.dumps(plain_part(options))) or options)
    patched = patch(source, **SPARSE, dense_blocks="1")
    sample(patched)
    assert record(patched).sparse_calls == 4
    options = pickle.loads(pickled[-1])
    assert options["psa_attention"] is None and options[OVERRIDE] is None
    (kept,) = options["wrappers"]["diffusion_model"]["psa_attention"]
    assert kept.__self__.settings == patch_settings(patched)


def plain_part(options: dict[str, Any]) -> dict[str, Any]:
    """Without the functions of this test, which nothing can pickle."""
    return {key: value for key, value in options.items() if key != "patches_replace"}


# What cannot be said


class Unsayable(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no text")


@contextmanager
def server(send: Callable[[str, str], None]) -> Iterator[None]:
    instance = SimpleNamespace(instance=SimpleNamespace(send_progress_text=send))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "server", SimpleNamespace(PromptServer=instance))
        yield


def patch_with_node(model: Any, **inputs: Any) -> Any:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    node = type("WithHidden", (PSAAttentionPatch,), {"hidden": SimpleNamespace(unique_id="7")})
    return node.execute(model, "balanced", **inputs).args[0]


def test_a_status_that_cannot_be_sent_costs_nothing(model: Any) -> None:
    def send(text: str, node: str) -> None:
        raise ConnectionError("the browser has gone")

    expected = sample(patch(model, **SPARSE))
    with server(send):
        patched = patch_with_node(model, **SPARSE)
        assert torch.equal(sample(patched), expected)
    assert (record(patched).outcome, record(patched).sparse_calls) == ("finished", 4 * BLOCKS)


@pytest.mark.parametrize("error", [RuntimeError("a lone \udc80 surrogate"), Unsayable(), RuntimeError(), KeyError()])
def test_whatever_an_error_says_its_run_goes_on(model: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    sent: list[bytes] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(session, "psa_attention", fail)
    expected = sample(model)
    with server(lambda text, node: sent.append(text.encode())):
        patched = patch_with_node(model, **SPARSE)
        assert torch.equal(sample(patched), expected)
    (reason,) = reasons(record(patched))
    assert reason.startswith(f"because PSA could not run ({type(error).__name__}: ")
    assert type(error).__name__ in sent[-1].decode()


def test_a_comparison_whose_error_cannot_be_said_costs_itself_only(comfyui: Path) -> None:
    from psa_pack.nodes.probe import Probe
    from psa_pack.psa_core import PSAConfig

    def fail() -> Tensor:
        raise Unsayable

    probe = Probe(PSAConfig(error_weight=0.1), 1.0)
    probe.see(0, 0, torch.zeros(1, 1, 4, 64), SimpleNamespace(), lambda config: None, fail)  # type: ignore[arg-type]
    assert [(str(reason), count) for reason, count in probe.dropped.items()] == [("after Unsayable: Unsayable", 1)]


def test_a_report_that_fails_takes_no_latent_along(model: Any) -> None:
    from psa_pack.nodes.attention_patch import AttentionPatch

    said = []

    def report(lines: Any) -> None:
        said.append(lines)
        raise RuntimeError("nobody listens")

    patched = patch(model, **SPARSE)
    expected = sample(patched)
    AttentionPatch(patch_settings(patched), report).attach(patched)
    assert torch.equal(sample(patched), expected)
    assert len(said) == 4 + 1
    assert record(patched).outcome == "finished"


def test_numbers_that_cannot_be_read_cost_themselves_only(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import tally

    def fail(calls: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for the numbers of a step")

    monkeypatch.setattr(tally, "read_calls", fail)
    patched = patch(model, **SPARSE)
    assert sample(patched).isfinite().all()
    assert record(patched).outcome == "finished"
    assert record(patched).sparse_calls == BLOCKS  # dense from where the first step's were asked for
    assert list(reasons(record(patched))) == [
        "because PSA could not run (OutOfMemoryError: no memory for the numbers of a step)"
    ]


# Gradients


def gradients(network: torch.nn.Module, options: dict[str, Any]) -> list[Tensor]:
    network.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 16, 3, 16, 18, generator=generator), torch.randn(1, 77, 4096, generator=generator)
    out = network(x, torch.tensor([500.0]), context=context, transformer_options=options)
    out.square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def test_inputs_that_need_gradients_stay_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LoRA training, which samples a clone of the model with gradients on."""
    import comfy.model_management
    from comfy.patcher_extension import WrappersMP
    from psa_pack.nodes.attention_patch import AttentionPatch
    from psa_pack.nodes.session import Session

    # As its training node sets it; only a newer ComfyUI has it.
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)
    settings = patch_settings(patch(model, **SPARSE))
    session = Session(settings, lambda percent: 1 - percent, lambda lines: None)
    wrapper = AttentionPatch(settings, lambda lines: None).around_model_call
    options = {
        "sigmas": torch.tensor([0.5]),
        "psa_attention": session,
        "wrappers": {WrappersMP.DIFFUSION_MODEL: {"psa_attention": [wrapper]}},
    }
    network = make_network()
    expected = gradients(network, {})
    found = gradients(network, options)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    run = session.finish("finished")
    assert reasons(run) == {"the call needs gradients, which PSA does not compute": BLOCKS}
    assert run.sparse_calls == 0


def test_weights_that_could_be_trained_do_not_matter_while_sampling(model: Any) -> None:
    trainable = make_model()
    for parameter in trainable.model.diffusion_model.parameters():
        parameter.requires_grad_(True)
    patched = patch(trainable, **SPARSE)
    sample(patched)
    assert record(patched).sparse_calls == 4 * BLOCKS


# Noise levels


@pytest.mark.parametrize(
    ("sigmas", "sparse"),
    [
        (0.5, True),
        (torch.tensor(0.5), True),
        (torch.tensor([0.5]), True),
        (torch.tensor([[0.5], [0.5]]), True),
        (1, False),  # before the window
        (torch.tensor([]), False),
        (torch.tensor([float("nan")]), False),
        (float("nan"), False),
        ([], False),
        ("much", False),
        (None, False),
    ],
)
def test_whatever_a_sampler_calls_its_noise_level(model: Any, sigmas: Any, sparse: bool) -> None:
    def wrapper(apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
        options = args["c"]["transformer_options"] | {"sigmas": sigmas}
        return apply_model(args["input"], args["timestep"], **args["c"] | {"transformer_options": options})

    source = model.clone()
    source.set_model_unet_function_wrapper(wrapper)
    patched = patch(source, **EVERYWHERE | {"start_percent": 0.5}, error_weight=1.0)
    out = sample(patched)
    assert record(patched).sparse_calls == (4 * BLOCKS if sparse else 0)
    if not sparse:
        assert torch.equal(out, sample(model))
        told = [str(record(patched).unused_cause), *reasons(record(patched))]
        assert {"the sampler does not tell the model its noise level", "before start_percent 0.5"} & set(told)

"""Whatever goes wrong in a run, the video renders or the run ends, and the next run knows nothing of it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import reasons, record
from test_nodes_patch import OVERRIDE, SPARSE, patch
from tiny_wan import BLOCKS, make_model, sample

pytestmark = pytest.mark.usefixtures("one_thread")

Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def dense(model: Any) -> Tensor:
    return sample(model)


@pytest.fixture(scope="module")
def sparse(model: Any) -> Tensor:
    return sample(patch(model, **SPARSE))


def raising(kind: type[Exception], message: str) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise kind(message)

    return fail


def break_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import backends

    monkeypatch.setattr(backends, "import_module", raising(ImportError, "libtriton.so: undefined symbol"))


def break_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core.backends import reference

    monkeypatch.setattr(reference, "prepare", raising(RuntimeError, "PassManager::run failed\n(a long dump)"))


def break_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core.backends import reference

    monkeypatch.setattr(reference, "attend", raising(RuntimeError, "Triton Error [CUDA]: invalid argument"))


def use_up_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core.backends import reference

    monkeypatch.setattr(reference, "importance", raising(torch.OutOfMemoryError, "CUDA out of memory. Tried 1 GiB"))


def fail_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import self_check

    self_check.check_once.cache_clear()
    monkeypatch.setitem(self_check.LIMITS, torch.float32, 0.0)


FAULTS: dict[str, tuple[Break, str]] = {
    "import error": (break_import, "ImportError: libtriton.so: undefined symbol"),
    "compile error": (break_compiler, "RuntimeError: PassManager::run failed"),
    "launch error": (break_launch, "RuntimeError: Triton Error [CUDA]: invalid argument"),
    "out of memory": (use_up_memory, "OutOfMemoryError: CUDA out of memory. Tried 1 GiB"),
    "failing self-check": (fail_self_check, "self-check of backend reference on cpu, torch.float32, head dim 128: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_turns_one_run_dense_and_the_next_one_is_sparse_again(
    model: Any, dense: Tensor, sparse: Tensor, name: str
) -> None:
    patched, (break_something, reason) = patch(model, **SPARSE), FAULTS[name]
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_something(monkeypatch)
        assert torch.equal(sample(patched), dense)
    assert record(patched).outcome == "finished"
    assert record(patched).sparse_calls == 0
    (said,) = reasons(record(patched))
    assert said.startswith(f"because PSA could not run ({reason}")
    assert "\n" not in said
    assert reasons(record(patched))[said] == 4 * BLOCKS
    assert torch.equal(sample(patched), sparse)
    assert record(patched).sparse_calls == 4 * BLOCKS
    assert_clean(model, patched)


def test_without_triton_the_run_says_what_to_install(
    model: Any, dense: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psa_pack.psa_core import capability

    monkeypatch.setattr(capability, "find_spec", lambda name: None)
    for platform, package in (("linux", "triton"), ("win32", "triton-windows")):
        monkeypatch.setattr(capability.sys, "platform", platform)
        patched = patch(model, **SPARSE | {"backend": "triton"})
        assert torch.equal(sample(patched), dense)
        (said,) = reasons(record(patched))
        assert f"Triton is not installed; install the {package} release that fits torch {torch.__version__}" in said


def test_memory_for_one_head_only_changes_no_bit(model: Any, sparse: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core.backends import reference

    patched = patch(model, **SPARSE)
    sample(patched)  # the self-check, which counts as no call, is behind it
    prepare, failures = reference.prepare, []

    def prepare_one_head(q: Tensor, *args: Any) -> Any:
        if q.shape[1] > 1:
            failures.append(q.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(q, *args)

    monkeypatch.setattr(reference, "prepare", prepare_one_head)
    assert torch.equal(sample(patched), sparse)
    assert record(patched).sparse_calls == len(failures) == 4 * BLOCKS


def test_comfyuis_interrupt_ends_a_run_and_the_next_one_is_whole(model: Any, sparse: Tensor) -> None:
    from comfy import model_management
    from psa_pack.nodes import session

    attend, calls = session.psa_attention, []

    def interrupt_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            model_management.interrupt_current_processing()
        return attend(*args, **kwargs)

    patched = patch(model, **SPARSE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(session, "psa_attention", interrupt_at_the_third)
        with pytest.raises(model_management.InterruptProcessingException):
            sample_interruptibly(patched)
    assert record(patched).outcome == "interrupted"
    assert 3 <= record(patched).sparse_calls < 4 * BLOCKS
    assert torch.equal(sample(patched), sparse)
    assert record(patched).outcome == "finished"
    assert_clean(model, patched)


def sample_interruptibly(patched: Any) -> Tensor:
    """Samples as ComfyUI's execution does, which looks for the interrupt wherever a model is called."""
    from comfy import model_management

    def look(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        model_management.throw_exception_if_processing_interrupted()
        return func(*args, **kwargs)

    watched = patched.clone()
    watched.model_options["transformer_options"][OVERRIDE] = look
    return sample(watched)


@pytest.mark.parametrize("where", ["another node's override", "another node's block", "the sampler"])
def test_an_exception_elsewhere_passes_through(model: Any, sparse: Tensor, where: str) -> None:
    patched, error = patch(model, **SPARSE), raising(KeyError, "of another node")
    failing = patched.clone()
    if where == "another node's override":
        failing.model_options["transformer_options"][OVERRIDE] = error
    elif where == "another node's block":
        failing.set_model_patch_replace(error, "dit", "double_block", 1)
    else:
        failing.set_model_sampler_post_cfg_function(error)
    with pytest.raises(KeyError, match="of another node"):
        sample(failing)
    assert record(patched).outcome == "failed"
    assert torch.equal(sample(patched), sparse)
    assert_clean(model, patched)


def test_fifty_runs_keep_no_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind in turn: finished, faulty, interrupted, failed."""
    run = {"steps": 2, "cfg": 1.0, "latent": (2, 8, 8)}
    patched = patch(model, **SPARSE)
    failing = patched.clone()
    failing.model_options["transformer_options"][OVERRIDE] = raising(KeyError, "of another node")

    def one_of(index: int) -> None:
        faults = list(FAULTS.values())
        if index % 3 == 0:
            sample(patched, **run)
        elif index % 3 == 1:
            with pytest.MonkeyPatch.context() as broken:
                faults[index % len(faults)][0](broken)
                sample(patched, **run)
        else:
            with pytest.raises(KeyError):
                sample(failing, **run)

    for index in range(6):
        one_of(index)
    before = living_bytes()
    for index in range(50):
        one_of(index)
    assert living_bytes() - before == 0


def living_bytes() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for candidate in gc.get_objects():
        if type(candidate) in (Tensor, torch.nn.Parameter) and candidate.device.type == "cpu":
            storage = candidate.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def assert_clean(model: Any, patched: Any) -> None:
    """No state, no hook: the model is as it was loaded, and the patch holds a record of plain numbers only."""
    from psa_pack.nodes.attention_patch import AttentionPatch

    assert model.model_options == patched.model_options == {"transformer_options": {}}
    assert not any(model.wrappers.values())
    for module in model.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    kept = vars(AttentionPatch.find(patched))
    assert kept.keys() == {"settings", "last_run", "_report"}
    assert_plain(kept["last_run"])


def assert_plain(value: Any) -> None:
    """Nothing but text and numbers, however deep."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = (*value, *value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            assert_plain(part)
    else:
        assert value is None or type(value) in (str, int, float, bool), value

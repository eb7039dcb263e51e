"""Loads the pack as ComfyUI does, under one name, and gives tests a real ComfyUI where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from pack import ROOT, load_pack

__all__ = ["FUZZ", "ROOT", "cases"]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # decided once, when Triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores among them

FUZZ = int(os.environ.get("FUZZ", "0"))  # `make fuzz`: so many times the cases, and other ones each time

# Time says nothing about a pure function on a busy machine.
settings.register_profile(
    "pack", deadline=None, derandomize=not FUZZ, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pack")


def cases(usual: int) -> int:
    """Random cases of a property: the usual number, or that times ``FUZZ``."""
    return usual * max(FUZZ, 1)


load_pack()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The source folder of a real ComfyUI, importable and set to the CPU."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI source folder; `make test` sets it")
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    return Path(path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other over such small tensors take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def user_folder(comfyui: Path, tmp_path: Path) -> Iterator[Path]:
    """An empty user folder of ComfyUI."""
    import folder_paths

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_user_directory(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Stop after a kernel that broke the CUDA context: every later test would fail for nothing of its own."""
    report = yield
    if call.excinfo is not None and "illegal memory access" in str(call.excinfo.value):
        item.session.shouldstop = f"{item.nodeid} broke the CUDA context"
    return report

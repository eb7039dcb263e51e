"""Loads the pack as ComfyUI does, under one name, and gives tests a real ComfyUI where there is one.

Tests that use the fixture ``comfyui``, themselves or through others, carry the mark ``comfyui``: their result depends
on ComfyUI's version, and `tests/suite.py` runs them with two.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from pack import ROOT, comfyui_version, installed_version, load_pack

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
sys.path.append(str(ROOT))  # for benchmarks; behind ComfyUI, which has modules of the same names


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Mark what depends on ComfyUI; start with what takes longest, so that no worker is left alone with it."""
    for item in items:
        if "comfyui" in getattr(item, "fixturenames", ()):
            item.add_marker("comfyui")
    yield
    items.sort(key=lambda item: item.path.name != "test_kernel_compilation.py")


def pytest_report_header() -> str:
    return versions()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say with the result what it is the result of."""
    terminalreporter.write_line(versions())
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "not tested here: kernels in bfloat16, wrong in Triton's interpreter; `make test-gpu` tests them on a GPU"
        )


def versions() -> str:
    """All that a result depends on, in a line."""
    comfyui, triton = os.environ.get("COMFYUI_PATH"), installed_version("triton")
    return ", ".join(
        (
            f"ComfyUI {comfyui_version(Path(comfyui))}" if comfyui else "no ComfyUI",
            f"torch {torch.__version__}",
            f"Triton {triton}" if triton else "no Triton",
            f"Python {platform.python_version()}",
        )
    )


@pytest.fixture(autouse=True)
def _like_any_other() -> Iterator[None]:
    """Random numbers of its own for every test, and no module of ComfyUI's hidden from those that come after."""
    torch.manual_seed(0)
    yield
    comfyui = os.environ.get("COMFYUI_PATH")
    if comfyui in sys.path:
        hiding = [folder for folder in sys.path[: sys.path.index(comfyui)] if (Path(folder) / "nodes").is_dir()]
        assert not hiding, f"{hiding} stand before ComfyUI in sys.path, and have a package `nodes` of their own"


@pytest.fixture
def all_cases_tried(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hypothesis ends early where it runs out of cases: no property may."""
    yield
    if said := getattr(request.node, "hypothesis_statistics", ""):
        assert "Stopped because settings.max_examples" in said


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source folder of a real ComfyUI, importable and set to the CPU."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI source folder; `make test` sets it")
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.base_directory = str(tmp_path_factory.mktemp("comfyui"))
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

"""The oldest PyTorch and Triton that the pack supports, in an environment of their own; the tests have the newest.

    python3 tests/compatibility.py    (make compatibility)

makes .venv-torch2.6, which takes everything but these packages from .venv, and runs the tests there that their versions
can make a difference to. On Linux, PyPI's torch 2.6 needs its CUDA libraries even where there is no GPU: 3 GB to fetch,
6 GB on the disk. With PIP_EXTRA_INDEX_URL at PyTorch's index of CPU builds it is a tenth of that.

What is not tried, and why, is in NOT_TRIED, and printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-torch2.6"
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
# numpy: what Triton 3.2's interpreter still takes
PACKAGES = (
    "torch==2.6.0", "torchvision==0.21.0", "torchaudio==2.6.0", "numpy==2.2.6",
    "triton==3.2.0; sys_platform == 'linux'",
)  # fmt: skip
NEWEST_PYTHON = (3, 13)
# Of pytest, here and in suite.py: a file is one worker's, for its servers; files come in the order of the collection.
WORKERS = ("-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder")

TESTS = (
    "tests/test_reference.py",
    "tests/test_attention_arguments.py",
    "tests/test_attention_memory.py",
    "tests/test_kernels.py",
    "tests/test_kernel_compilation.py",
    "tests/test_nodes_override.py",
    "tests/test_nodes_patch.py",
    "tests/test_nodes_schema.py",
)
LEFT_OUT = tuple(f"tests/test_kernel_compilation.py::test_kernels_fit[{sm}]" for sm in (80, 89, 100, 120))
NOT_TRIED = {
    "kernels for sm_100 and sm_120": "the compiler in Triton 3.2 does not know these GPUs; Triton 3.3 and newer do",
    "kernels for sm_80 and sm_89": "for time: sm_86 has their settings and the least shared memory of the three",
    "kernels within their registers": "the settings are tuned with newer Tritons; 3.2 spills more, which costs time",
    "torch.compile": "for time: ten seconds a test; the newest torch runs them",
    "a newer ComfyUI": "`make test` runs one with the newest torch, where one lies",
    "GPUs": "`make test-gpu` on one, with whatever torch and Triton are there",
    "Windows and macOS": "no machine of that kind; tests of paths, encodings and names stand in",
}


def main() -> int:
    """Install and run; pytest's exit status."""
    if sys.version_info[:2] > NEWEST_PYTHON:
        print(f"not tried: there is no {PACKAGES[0]} for Python {sys.version.split()[0]}")
        return 0
    install()
    for what, reason in NOT_TRIED.items():
        print(f"not tried: {what} ({reason})")
    chosen = [
        *WORKERS,
        "-m",
        "not gpu",
        "-k",
        "not torch_compile",
        *(f"--deselect={test}" for test in LEFT_OUT),
        *TESTS,
    ]
    command = [python(ENVIRONMENT), "-m", "pytest", "-p", "no:cacheprovider", *WORKERS, *chosen]
    return subprocess.run(command, cwd=ROOT).returncode


def install() -> None:
    """Make the environment; quick when it is there."""
    done = ENVIRONMENT / ".installed"
    if done.exists() and done.read_text("utf-8") == repr(PACKAGES):
        return
    print(f"installing {PACKAGES[0]} and what belongs to it into {ENVIRONMENT.name}", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    command = [python(ENVIRONMENT), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *PACKAGES]
    subprocess.run(command, check=True)
    # behind its own packages, those of the tests
    (site_packages(ENVIRONMENT) / "tests.pth").write_text(f"{site_packages(ROOT / '.venv')}\n", encoding="utf-8")
    done.write_text(repr(PACKAGES), encoding="utf-8")


def python(environment: Path) -> str:
    return str(environment / SCRIPTS / "python")


def site_packages(environment: Path) -> Path:
    """Where an environment's packages are."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([python(environment), "-c", code], check=True, capture_output=True, text=True)
    return Path(run.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())

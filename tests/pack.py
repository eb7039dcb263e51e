"""Loads the pack as ComfyUI does: from its root folder, under a name that is not the folder's; and tells versions."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK = "psa_pack"


def load_pack() -> None:
    """Make ``import psa_pack`` work, with one pack however often it is asked for."""
    if PACK in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)


def comfyui_version(tree: Path) -> str:
    """Version that a ComfyUI source folder says it has."""
    found = re.search(r'__version__ = "(.+)"', (tree / "comfyui_version.py").read_text("utf-8"))
    return found[1] if found else "unknown"


def installed_version(package: str) -> str:
    """Version of an installed package; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""comfy-import-guard finds nothing in the pack that this ComfyUI has removed or changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

pytest.importorskip("comfy_import_guard", reason="comfy-import-guard is not installed; `make test` installs it")

# What the pack tries to import, since only newer ComfyUIs have it.
TRIED = {"comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel", "comfy.model_prefetch.pause_malloc_graph"}
CHECK = "import sys; from comfy_import_guard.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def cache(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's source in a git repository, where the tool looks for it."""
    cache: Path = tmp_path_factory.mktemp("cache")
    for folder in ("comfy", "comfy_api", "comfy_execution", "comfy_extras"):
        shutil.copytree(
            comfyui / folder, cache / "ComfyUI" / folder, ignore=shutil.ignore_patterns("*.json", "*.model")
        )
    for file in comfyui.glob("*.py"):
        shutil.copy(file, cache / "ComfyUI")
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--all", "--force"], [*author, "commit", "--quiet", "-m", "source"]):
        subprocess.run(["git", *command], cwd=cache / "ComfyUI", check=True)
    return cache


def check(pack: Path, cache: Path) -> dict[str, Any]:
    """What the tool finds in the pack."""
    arguments = ["--json", "--quiet", "--offline", "--cache-dir", str(cache)]
    arguments += ["check", "--strict", "--no-update", "--target", "HEAD", "--comfy-dir", str(pack.parents[1])]
    done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    (found,) = json.loads(done.stdout)["packs"]
    return found


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """The pack where ComfyUI would have it."""
    pack = tmp_path / "custom_nodes" / "psa-attention"
    for name in ("nodes", "psa_core"):
        shutil.copytree(ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", pack)
    return pack


def test_nothing_that_the_pack_uses_is_gone_or_changed(pack: Path, cache: Path) -> None:
    """Strictly: nothing doubtful either but the imports that are tried, and each of these is really not there."""
    found = check(pack, cache)
    assert found["references"] > 20
    for kind in ("breaking", "unresolvable", "signature_drift", "unparseable"):
        assert found[kind] == [], kind
    tried = {entry["dotted"] for entry in found["soft"]}
    assert tried == {name for name in TRIED if not has(cache / "ComfyUI", name)}


def has(comfyui: Path, name: str) -> bool:
    """Whether ComfyUI's source defines a name, told by its text."""
    module, _, symbol = name.rpartition(".")
    file = comfyui / (module.replace(".", "/") + ".py")
    return file.exists() and f" {symbol}(" in file.read_text("utf-8")


def test_what_is_gone_is_found(pack: Path, cache: Path) -> None:
    (pack / "nodes" / "old.py").write_text("from comfy.model_management import of_yesterday\n")
    found = check(pack, cache)
    assert [entry["dotted"] for entry in found["breaking"]] == ["comfy.model_management.of_yesterday"]

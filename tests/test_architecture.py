"""The house as facts: which module may import which, what importing loads, and that all files agree with each other."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psa_pack.psa_core.presets import load_presets, parse_presets

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = [*sorted((ROOT / "workflows").glob("*.json")), ROOT / "demo/workflow.json"]
README = ROOT / "README.md"

# Every module of the core with all of ours that it may import. The Triton backend, one folder, is one row.
ARROWS = {
    "psa_core": {"attention", "config", "layout", "ordering"},
    "capability": set(),
    "config": set(),
    "layout": set(),
    "curves": set(),
    "importance": set(),
    "schedule": set(),
    "models": set(),
    "models.cogvideox": set(),
    "models.wan": set(),
    "official_presets": {"models.wan"},
    "yaml_text": set(),
    "presets": {"config", "official_presets", "schedule", "yaml_text"},
    "levels": {"config"},
    "ordering": {"config", "curves", "layout"},
    "pooling": set(),
    "grouping": {"ordering"},
    "backends": {"capability", "config", "ordering"},
    "backends.reference": {"config", "grouping", "importance", "levels", "ordering", "pooling"},
    "backends.triton": {"config", "grouping", "ordering", "importance", "levels"},
    "attention": {"backends", "capability", "config", "layout", "ordering"},
    "self_check": {"attention", "backends", "config", "layout", "ordering"},
    "synthetic": set(),
    "bench": {"attention", "capability", "config", "layout", "ordering", "synthetic"},
}
# What the Triton backend shares with the reference: a rank needs a sort, which torch has, and a clamp has one home.
SHARED_WITH_TRITON = {
    "grouping": {"full_video_blocks"},
    "levels": {"cap_levels", "select_by_rank"},
    "importance": {"LEVEL_BIAS_CLAMP", "importance_bias_clamp"},
}
CORE_LIBRARIES = {"numpy", "torch", "yaml"}
# Likewise every module of the nodes with all of theirs; the core they may all import, but for its backends' insides.
NODE_ARROWS = {
    "nodes": {
        *("attention_patch", "compare", "load_cogvideox", "preset", "preset_loader", "quality_probe", "report"),
    },
    "words": set(),
    "shared_by_copies": set(),
    "models": set(),
    "models.sequence": {"words"},
    "models.wan": {"models.sequence", "words"},
    "models.cogvideox": {"models.sequence", "words"},
    "models.known": {"models.cogvideox", "models.sequence", "models.wan", "words"},
    "gate": {"words"},
    "run_record": {"words"},
    "tally": {"run_record", "words"},
    "probe": {"shared_by_copies", "tally", "words"},
    "session": {"gate", "probe", "run_record", "shared_by_copies", "tally", "words"},
    "override": {"models.sequence", "session", "shared_by_copies", "words"},
    "status": {"words"},
    "preset_loader": set(),
    "schedule_inputs": set(),
    "preset": {"preset_loader", "schedule_inputs"},
    "attention_patch": {
        *("gate", "models.known", "models.sequence", "override", "preset_loader", "run_record", "session"),
        *("schedule_inputs", "shared_by_copies", "status", "words"),
    },
    "suggestion": {"probe", "words"},
    "quality_probe": {
        *("attention_patch", "gate", "preset_loader", "probe", "run_record", "status", "suggestion", "words"),
    },
    "run_facts": {"run_record"},
    "report_picture": {"run_facts", "run_record", "words"},
    "report": {"attention_patch", "report_picture", "run_facts", "run_record", "status", "words"},
    "compare": {"status", "words"},
    "cogvideox_keys": set(),
    "load_cogvideox": {"cogvideox_keys", "models.cogvideox", "override"},
}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every import of a file as (module, name), relative ones resolved; a plain ``import a.b`` gives no name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                # `from .backends import reference` imports a module, not a name in one.
                inner = ROOT / module.replace(".", "/") / alias.name
                is_module = bool(node.level) and (
                    inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
                )
                yield (f"{module}.{alias.name}", "") if is_module else (module, alias.name)


def core_module(dotted: str) -> str:
    """Row of ARROWS that a dotted module name belongs to."""
    inside = dotted.removeprefix("psa_core").strip(".")
    if not inside:
        return "psa_core"
    return "backends.triton" if inside.startswith("backends.triton") else inside


def core_files() -> dict[Path, str]:
    files = {}
    for path in sorted((ROOT / "psa_core").rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        files[path] = core_module(dotted)
    return files


def is_ours(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_every_core_module_has_its_arrows() -> None:
    assert set(core_files().values()) == set(ARROWS)


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_point_down(path: Path) -> None:
    row = core_files()[path]
    for module, name in imports(path):
        if is_ours(module, "psa_core"):
            target = core_module(module)
            assert target == row or target in ARROWS[row], f"{row} imports {target}"
            if row == "backends.triton" and target in SHARED_WITH_TRITON:
                assert name in SHARED_WITH_TRITON[target]
        else:
            library = module.partition(".")[0]
            allowed = CORE_LIBRARIES | ({"triton"} if row == "backends.triton" else set())
            assert library in sys.stdlib_module_names or library in allowed, f"{row} imports {library}"


def node_files() -> dict[Path, str]:
    files = {}
    for path in sorted((ROOT / "nodes").rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        files[path] = dotted.removeprefix("nodes.")
    return files


def test_every_node_module_has_its_arrows() -> None:
    assert set(node_files().values()) == set(NODE_ARROWS)


def test_arrows_never_lead_back() -> None:
    """Each row's targets can be put before it."""
    for arrows in (ARROWS, NODE_ARROWS):
        placed: set[str] = set()
        while ready := {row for row, targets in arrows.items() if row not in placed and targets <= placed}:
            placed |= ready
        assert placed == set(arrows)


@pytest.mark.parametrize("path", node_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_node_imports_point_down(path: Path) -> None:
    row = node_files()[path]
    for module, name in imports(path):
        if (module, name) == ("nodes", "common_ksampler"):
            continue  # ComfyUI's own module of that name
        if is_ours(module, "nodes"):
            target = module.removeprefix("nodes.")
            assert target in NODE_ARROWS[row], f"{row} imports {target}"
        assert module.partition(".")[0] not in {"triton", "demo", "tests", "benchmarks"}
        assert not is_ours(module, "psa_core.backends.triton")
        assert not is_ours(module, "psa_core.backends.reference")


@pytest.mark.parametrize("path", node_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_a_familys_own_file_knows_comfyuis_networks(path: Path) -> None:
    if node_files()[path].startswith("models."):
        return
    assert [module for module, _ in imports(path) if is_ours(module, "comfy.ldm")] == []
    nodes = list(ast.walk(ast.parse(path.read_text())))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]  # a family's function may have the name
    for node in nodes:
        assert not (isinstance(node, ast.Attribute) and node.attr == "blocks" and node not in called)
        assert not (isinstance(node, ast.Constant) and node.value in ("double_block", "single_block"))


def test_importing_the_core_loads_neither_triton_nor_comfy() -> None:
    names = [f"psa_core.{row}" for row in ARROWS if row not in ("psa_core", "backends.triton")]
    code = (
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
        f"import psa_core, {', '.join(names)}\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(', '.join(sorted(loaded & {'triton', 'comfy', 'comfy_api', 'folder_paths', 'server'})) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*")), ids=lambda path: path.name)
def test_every_preset_file_loads_with_the_three_names_of_the_node(path: Path) -> None:
    presets = load_presets(path)
    assert {"balanced", "quality", "fast"} <= presets.keys()
    assert all(preset.family == path.stem and preset.source for preset in presets.values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_workflow_agree_with_its_nodes(path: Path) -> None:
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert max(nodes) <= workflow["last_node_id"]
    ends: Counter[tuple[str, int]] = Counter()
    for link, source, slot, target, target_slot, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][target_slot]
        assert link <= workflow["last_link_id"]
        assert link in output["links"] and entry["link"] == link
        assert output["type"] == entry["type"] == kind
        ends.update([("out", link), ("in", link)])
    drawn: Counter[tuple[str, int]] = Counter()
    for node in nodes.values():
        drawn.update(("out", link) for output in node["outputs"] for link in output["links"] or ())
        drawn.update(("in", entry["link"]) for entry in node["inputs"] if entry["link"] is not None)
    assert drawn == ends
    assert set(ends.values()) == {1}


MODEL_FILES = (".safetensors", ".safetensors.index.json")
MODEL_FOLDERS = {"clip_vision", "diffusion_models", "loras", "text_encoders", "vae"}


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.name)
def test_a_bundled_workflow_says_where_nodes_and_models_come_from(path: Path) -> None:
    nodes: list[dict[str, Any]] = json.loads(path.read_text())["nodes"]
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for node in nodes:
        if node["type"] in ("Note", "MarkdownNote"):  # the frontend's own
            continue
        own = node["type"].startswith("PSA")
        assert node["properties"]["cnr_id"] == ("psa-attention" if own else "comfy-core")
        assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])
        assert not own or node["properties"]["ver"] == version[1]
        files = [value for value in node.get("widgets_values", []) if str(value).endswith(MODEL_FILES)]
        models = node["properties"].get("models", [])
        listed = {f"{model['directory']}/{model['name']}".partition("/")[2] for model in models}
        assert set(files) <= listed
        assert bool(files) == bool(models)
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            # ComfyUI's frontend looks for a file in a folder of its own by both names.
            assert Path(model["url"]).name == Path(model["name"]).name
            assert model["directory"].partition("/")[0] in MODEL_FOLDERS
    assert path.with_suffix(".jpg").is_file()


def test_no_two_workflows_share_a_thumbnail() -> None:
    thumbnails = [path.read_bytes() for path in sorted((ROOT / "workflows").glob("*.jpg"))]
    assert len(set(thumbnails)) == len(thumbnails)


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_make_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"`?make ([\w-]+)", " ".join(re.findall(r"`[^`]*`|^    .*$", README.read_text(), re.M))))
    assert {"demo", "test"} <= commands <= targets


def test_the_readmes_preset_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert parse_presets(example, "README.md")


def test_the_readmes_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_readmes_demo_figures_are_the_committed_ones() -> None:
    results = json.loads((ROOT / "docs/demo_results.json").read_text())
    text = README.read_text()
    for figure in (
        f"{results['psnr_db']:.1f} dB",
        f"density {results['density']:.2f}",
        f"{results['sparse_steps_share']:.0%} of the steps",
    ):
        assert figure in text


def test_no_path_of_one_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("this is no git checkout, so there is no list of committed files")
    pattern = re.compile(rb"(?<![\w.])/(work|tmp|root|home|Users|mnt)/\w")
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and (match := pattern.search(path.read_bytes())):
            found.append(f"{name}: {match[0]!r}")
    assert found == []

"""What a user gets: the archive, the way there through the registry, and folders and systems it must bear."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from comfy_cli import VERSION, missing_reason, run_comfy_cli
from comfy_server import ComfyServer
from registry_stub import RegistryStub

av = pytest.importorskip("av", reason="av is not installed; `make test` installs it")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if sys.version_info >= (3, 13):
    from ntpath import isreserved
else:

    def isreserved(name: str) -> bool:
        return PureWindowsPath(name).is_reserved()


ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
NAME = "psa-attention"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FRONTEND_NODES = {"Note", "MarkdownNote"}
# What a user of the nodes needs; everything else of the repository stays out of the archive.
SHIPPED = {
    "__init__.py",
    "nodes",
    "psa_core",
    "presets",
    "workflows",
    "web",
    "locales",
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "README_zh.md",
    "CHANGELOG.md",
    "LICENSE",
    "SECURITY.md",
}
# Texts that registries' scanners have flagged, and ways to the network, which the pack has no use for.
FLAGGED = (
    r"\beval\(", r"\bexec\(", r"os\.environ\[", r"\bsubprocess\b", r"os\.system", r"\b__import__\b", r"\bctypes\b",
    r"\bpickle\.loads?\b", r"\btorch\.load\b", r"\bb64decode\b", r"\bmarshal\b", r"\bsocket\b", r"\burllib\b",
    r"\brequests\.", r"\baiohttp\b", r"\bhttpx\b",
)  # fmt: skip
needs_comfy_cli = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


def tracked_files() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if done.returncode:
        pytest.skip("this is no git checkout, so there is no list of its files")
    return [name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of the files as they are now, since comfy-cli packs what git knows, into its folder."""
    folder: Path = tmp_path_factory.mktemp("checkout") / NAME
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def archive(checkout: Path) -> zipfile.ZipFile:
    """What comfy-cli packs."""
    run_comfy_cli("node", "pack", folder=checkout, home=checkout.parent)
    return zipfile.ZipFile(checkout / "node.zip")


@pytest.fixture(scope="module")
def stand_in_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Files by the names of the bundled workflows' models: empty, but the demo's for Wan 2.1 1.3B and its VAE."""
    folder: Path = tmp_path_factory.mktemp("models")
    weights = {
        "wan2.1_t2v_1.3B_fp16.safetensors": DEMO / "weights/wan_demo.safetensors",
        "wan_2.1_vae.safetensors": DEMO / "weights/wan_demo_vae.safetensors",
    }
    models: dict[str, list[Path]] = {}
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text("utf-8"))["nodes"]:
            for model in node["properties"].get("models", []):
                file = folder / model["directory"] / model["name"]
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(weights.get(model["name"], "/dev/null"), file)
                    models.setdefault(str(file.parent.relative_to(folder)), []).append(file)
    return models


@pytest.fixture(scope="module")
def published(checkout: Path) -> Iterator[RegistryStub]:
    """A registry that has been given this version of the pack."""
    with RegistryStub() as registry:
        home = checkout.parent
        run_comfy_cli("node", "publish", "--token", "t", folder=checkout, home=home, **registry.environment)
        yield registry


@pytest.fixture(scope="module")
def installed(published: RegistryStub, comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack's folder in a fresh ComfyUI, after installing it from the registry."""
    home: Path = tmp_path_factory.mktemp("fresh")
    workspace = home / "ComfyUI"
    shutil.copytree(comfyui, workspace, ignore=shutil.ignore_patterns("__pycache__", ".git", "user", "output"))
    arguments = ["--workspace", str(workspace), "node", "registry-install", NAME]
    run_comfy_cli(*arguments, folder=home, home=home, **published.environment)
    return workspace / "custom_nodes" / NAME


@pytest.fixture(scope="module")
def server(installed: Path, stand_in_models: dict[str, list[Path]]) -> Iterator[ComfyServer]:
    """That ComfyUI, started again."""
    nodes = [installed, DEMO / "prompt_node"]
    comfyui = installed.parents[1]
    with ComfyServer(comfyui, models=stand_in_models, custom_nodes=nodes, with_pack=False, cpu=True) as running:
        yield running


@needs_comfy_cli
def test_the_registry_has_nothing_to_object_to(checkout: Path) -> None:
    said = run_comfy_cli("node", "validate", folder=checkout, home=checkout.parent)
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_what_the_registry_asks_of_pyproject() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}[a-z0-9]", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    for key, largest in (("Icon", (400, 400)), ("Banner", (2100, 900))):
        file = ROOT / comfy[key].partition("/main/")[2]
        with Image.open(file) as image:
            assert image.width <= largest[0] and image.height <= largest[1]
            assert key == "Icon" or image.width / image.height == 21 / 9


@needs_comfy_cli
def test_the_archive_holds_what_a_user_needs_and_no_more(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == SHIPPED
    assert sum(info.compress_size for info in archive.infolist()) < 3_000_000
    allowed = {".py", ".yaml", ".json", ".jpg", ".md", ".png", ".toml", ".txt", ""}
    assert {Path(name).suffix for name in names} <= allowed
    lost = [name for name in tracked_files() if name.partition("/")[0] in SHIPPED and name not in names]
    assert lost == []


@needs_comfy_cli
def test_nothing_in_the_archive_that_a_scanner_flags(archive: zipfile.ZipFile) -> None:
    found = []
    for name in archive.namelist():
        if name.endswith(".py"):
            text = archive.read(name).decode()
            found += [f"{name}: {match[0]}" for flagged in FLAGGED if (match := re.search(flagged, text))]
    assert found == []


@needs_comfy_cli
def test_the_registry_is_told_what_pyproject_says(published: RegistryStub) -> None:
    (version,) = published.versions
    assert version["node"]["id"] == NAME
    assert version["publisher"] == PROJECT["tool"]["comfy"]["PublisherId"]
    assert version["node"]["name"] == PROJECT["tool"]["comfy"]["DisplayName"]
    assert version["node"]["icon"].endswith("/web/icon.png")
    assert version["node"]["banner_url"].endswith("/web/banner.png")
    assert version["node_version"]["version"] == PROJECT["project"]["version"]
    assert version["node_version"]["dependencies"] == PROJECT["project"]["dependencies"]
    assert version["node_version"]["supported_comfyui_version"] == PROJECT["tool"]["comfy"]["requires-comfyui"]


@needs_comfy_cli
def test_after_installing_from_the_registry_all_nodes_are_there(server: ComfyServer) -> None:
    info = server.object_info()
    assert nodes_of(info, NAME) == {path.name for path in (ROOT / "web/docs").iterdir()}
    assert "wan2.1_14b/balanced" in info["PSAPresetLoader"]["input"]["required"]["preset"][1]["options"]
    translations = server.get("/i18n")
    assert all(nodes_of(info, NAME) <= translations[language]["nodeDefs"].keys() for language in ("en", "zh"))
    templates = server.get("/workflow_templates")[NAME]
    assert sorted(templates) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@needs_comfy_cli
def test_a_bundled_workflow_runs_after_installing_from_the_registry(server: ComfyServer, tmp_path: Path) -> None:
    """With the demo's model in place of Wan 1.3B, and its prompts in place of a text encoder of 6.7 GB."""
    workflow = json.loads((ROOT / "workflows/psa_wan2.1_t2v_1.3b.json").read_text("utf-8"))
    demo = json.loads((DEMO / "workflow.json").read_text("utf-8"))
    prompt = next(node for node in demo["nodes"] if node["type"] == "PSADemoPrompt")
    for node in workflow["nodes"]:
        if node["type"] == "CLIPTextEncode":
            node |= {key: prompt[key] for key in ("type", "inputs", "widgets_values", "properties")}
        elif node["type"] == "EmptyHunyuanLatentVideo":
            node["widgets_values"] = [128, 128, 17, 1]
        elif node["type"] == "KSampler":
            node["widgets_values"][2] = 4
        elif node["type"] == "PSAAttentionPatch":
            node["widgets_values"][1:7] = [0.02, 0.0, 1.0, "", 0, "reference"]
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] not in ("CLIPLoader", "MarkdownNote")]
    left = {node["id"] for node in workflow["nodes"]}
    workflow["links"] = [link for link in workflow["links"] if link[1] in left and link[3] in left]
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow))
    where = ["--wait", "--where", "local", "--host", "127.0.0.1", "--port", str(server.port), "--timeout", "240"]
    run_comfy_cli("run", "--workflow", str(file), *where, folder=tmp_path, home=tmp_path)
    (video,) = (server.output_folder / "video").glob("psa_wan2.1_t2v_1.3b*.mp4")
    with av.open(str(video)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 17
    assert re.search(r"PSA wan2.1_1.3b balanced: \d+ sparse calls \(mean density 0\.\d+, reference\)", server.log())


@needs_comfy_cli
@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_comfy_cli_finds_every_workflow_valid(server: ComfyServer, path: Path, tmp_path: Path) -> None:
    info = server.object_info()
    nodes = [node for node in json.loads(path.read_text("utf-8"))["nodes"] if node["type"] not in FRONTEND_NODES]
    if missing := sorted({node["type"] for node in nodes} - info.keys()):
        pytest.skip(f"this ComfyUI is older than the workflow's nodes: {', '.join(missing)}")
    if "cogvideox" in path.stem and "cogvideox" not in info["CLIPLoader"]["input"]["required"]["type"][0]:
        pytest.skip("this ComfyUI has no CogVideoX of its own; COMFYUI_PATH may name a newer one")
    (tmp_path / "object_info.json").write_text(json.dumps(info))
    said = run_comfy_cli(
        *("--json", "workflow", "validate", "--workflow", str(path), "--input", "object_info.json"),
        folder=tmp_path,
        home=tmp_path,
    )
    data = json.loads(said)["data"]
    assert (data["valid"], data["errors"], data["warnings"]) == (True, [], [])
    assert data["converted_node_count"] == len(nodes)


def test_a_clone_loads_from_a_folder_of_any_name(comfyui: Path, tmp_path: Path) -> None:
    """Dashes, dots, brackets, a digit first. (With a space in the name, ComfyUI serves no pack's help pages.)"""
    folder = tmp_path / "4.ComfyUI-psa-attention-main(1)"
    for name in tracked_files():
        if name.partition("/")[0] in SHIPPED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    with ComfyServer(comfyui, custom_nodes=[folder], with_pack=False, cpu=True) as server:
        info = server.object_info()
        assert nodes_of(info, folder.name) == {path.name for path in (ROOT / "web/docs").iterdir()}
        assert "wan2.1_14b/balanced" in info["PSAPresetLoader"]["input"]["required"]["preset"][1]["options"]
        assert server.get("/workflow_templates")[folder.name]
        page = f"/extensions/{quote(folder.name)}/docs/PSAAttentionPatch/en.md"
        with urlopen(server.url + page) as answer:
            assert answer.read() == (ROOT / "web/docs/PSAAttentionPatch/en.md").read_bytes()


def nodes_of(info: dict[str, Any], folder: str) -> set[str]:
    """Nodes that come from a folder of custom_nodes."""
    return {name for name, node in info.items() if node["python_module"] == f"custom_nodes.{folder}"}


def test_requirements_are_few_and_the_same_everywhere() -> None:
    """ComfyUI-Manager and comfy-cli install requirements.txt line by line, pip reads pyproject."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert lines == PROJECT["project"]["dependencies"]
    for requirement in map(Requirement, lines):
        # Floors only: the pack never replaces what ComfyUI runs on.
        assert {specifier.operator for specifier in requirement.specifier} == {">="}
        assert requirement.name not in ("torch", "triton", "triton-windows")
        assert requirement.specifier.contains(installed_version(requirement.name))


def test_every_file_can_be_on_windows() -> None:
    names = tracked_files()
    for name in names:
        assert not any(map(isreserved, Path(name).parts))
        assert not re.search(r'[<>:"|?*\\]|[ .](/|$)', name)
        assert len(name) <= 100  # behind C:\\Users\\...\\ComfyUI\\custom_nodes\\psa-attention within the 260 of Windows
    assert len({name.lower() for name in names}) == len(names)


@pytest.mark.parametrize("folder", ["nodes", "psa_core"])
def test_text_is_read_and_written_with_an_encoding(folder: str) -> None:
    """Windows would take the user's own code page."""
    bare = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                before = {"read_text": 0, "write_text": 1}.get(call.func.attr)
                named = any(keyword.arg == "encoding" for keyword in call.keywords)
                if before is not None and not named and len(call.args) <= before:
                    bare.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert bare == []


@pytest.fixture
def release(tmp_path: Path) -> Any:
    """Run .github/release.py in a repository whose last commit has version 1.2.3."""
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], cwd=folder, check=True
        )

    def write(version: str, publisher: str = "somebody") -> None:
        (folder / "pyproject.toml").write_text(
            f'[project]\nversion = "{version}"\n[tool.comfy]\nPublisherId = "{publisher}"\n'
        )
        (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 1.3.0\n\n- New.\n\n## 1.2.3\n\n- Old.\n\n## 1.10.0\n")

    def run(version: str, publisher: str = "somebody") -> tuple[int, str]:
        write(version, publisher)
        command = [sys.executable, str(ROOT / ".github/release.py"), "HEAD", "changes.md"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        return done.returncode, (done.stdout + done.stderr).strip()

    write("1.2.3")
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "first")
    run.folder = folder
    return run


@pytest.mark.skipif(sys.version_info < (3, 11), reason="runs on the Python of publish.yml, which has tomllib")
@pytest.mark.parametrize(
    ("version", "publisher", "answer"),
    [
        ("1.2.3", "somebody", (0, "release=false")),
        ("1.3.0", "somebody", (0, "release=true")),
        ("1.3.0", "your-publisher-id", (1, "PublisherId: is not set in pyproject.toml")),
        ("1.2.0", "somebody", (1, "version: 1.2.0 is below 1.2.3, which it was before")),
        ("1.10.0", "somebody", (1, "CHANGELOG.md: has nothing under a heading '## 1.10.0'")),
        ("1.3", "somebody", (1, "version: '1.3' is not three numbers such as 1.2.3")),
    ],
)
def test_a_push_releases_a_version_only_if_it_rose(
    release: Any, version: str, publisher: str, answer: tuple[int, str]
) -> None:
    assert release(version, publisher) == answer
    if answer == (0, "release=true"):
        assert (release.folder / "changes.md").read_text() == "- New.\n"


def test_the_publish_workflow_uses_what_is_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text("utf-8"))
    commands = "\n".join(step.get("run", "") for step in workflow["jobs"]["publish"]["steps"])
    assert f"comfy-cli=={VERSION}" in commands
    assert (ROOT / re.search(r"python (\S+)", commands)[1]).is_file()  # type: ignore[index]

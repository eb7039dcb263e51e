"""What the pack reaches out for and brings with it: no network, no program, no code in weights."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT

# A fresh Python, for an audit hook stays for good; what ComfyUI itself does while it is imported comes before.
OFFLINE = """
import asyncio, os, sys
sys.path[:0] = [{tests!r}, {comfyui!r}]
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.sample, comfy_api.latest, folder_paths, torch
from pack import load_pack
from runs import record
from tiny_wan import make_model, sample

model, loop, seen = make_model(), asyncio.new_event_loop(), []
sample(model)

def note(event, arguments):
    library, _, action = event.partition(".")
    if library in ("socket", "urllib", "http", "ftplib", "smtplib", "subprocess", "webbrowser") or (
        library == "os" and action in ("system", "exec", "fork", "forkpty", "posix_spawn", "spawn", "startfile")
    ):
        seen.append(event + repr(arguments)[:200])

sys.addaudithook(note)
load_pack()
import psa_pack
nodes = {{node.GET_SCHEMA().node_id: node for node in loop.run_until_complete(
    loop.run_until_complete(psa_pack.comfy_entrypoint()).get_node_list())}}
for node in nodes.values():
    node.GET_NODE_INFO_V1()
preset = nodes["PSAPresetLoader"].execute("wan2.1_1.3b/fast").args[0]
preset = nodes["PSAPreset"].execute("mine", base=preset, min_tokens=0, save=False).args[0]
patched = nodes["PSAAttentionPatch"].execute(
    model, "balanced", custom_preset=preset, start_percent=0.0, backend="reference").args[0]
sample(patched)
assert record(patched).sparse_calls == 8
print(seen)
"""
# Likewise; what Python's libraries and ComfyUI read of their own is theirs.
FILES = """
import asyncio, os, sys
sys.path[:0] = [{tests!r}, {comfyui!r}]
sys.dont_write_bytecode = True
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.sample, comfy_api.latest, folder_paths, torch
from types import SimpleNamespace
from pack import ROOT, load_pack
from tiny_wan import make_model, sample

user, temp = {user!r}, {temp!r}
folder_paths.set_user_directory(user)
folder_paths.set_temp_directory(temp)
model, loop = make_model(), asyncio.new_event_loop()
sample(model)
sys.modules["server"] = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace()))

places = {{
    os.path.join(user, "default", "comfy.settings.json"): "comfy.settings.json",
    os.path.join(user, "psa_presets"): "psa_presets",
    temp: "temp",
    {comfyui!r}: "",
    **{{path: "" for path in (sys.prefix, sys.base_prefix, *filter(None, sys.path), "/proc", "/sys", "/dev")}},
    str(ROOT / "nodes"): "pack", str(ROOT / "psa_core"): "pack", str(ROOT / "presets"): "pack",
    str(ROOT / "__init__.py"): "pack", str(ROOT / "__pycache__"): "pack", {tests!r}: "",
}}
places = {{os.path.realpath(path): place for path, place in places.items() if os.path.realpath(path) != str(ROOT)}}
seen = set()

def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        paths = [path] if isinstance(path, (str, bytes, os.PathLike)) else []
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        paths, writes = [value for value in arguments if isinstance(value, (str, bytes, os.PathLike))], True
    else:
        return
    for path in paths:
        path = os.path.realpath(os.fsdecode(path))
        inside = [place for place in places if path == place or path.startswith(place + os.sep)]
        place = places[max(inside, key=len)] if inside else path
        if place:
            seen.add(("write " if writes else "read ") + place)

sys.addaudithook(note)
load_pack()
import psa_pack
nodes = {{node.GET_SCHEMA().node_id: node for node in loop.run_until_complete(
    loop.run_until_complete(psa_pack.comfy_entrypoint()).get_node_list())}}
for node in nodes.values():
    node.GET_NODE_INFO_V1()
nodes["PSAPreset"].execute("mine", error_weight=0.5, min_tokens=0, save=True)
nodes["PSAPresetLoader"].fingerprint_inputs("user/mine/mine")
preset = nodes["PSAPresetLoader"].execute("user/mine/mine").args[0]
patched = nodes["PSAAttentionPatch"].execute(
    model, "balanced", custom_preset=preset, start_percent=0.0, backend="reference").args[0]
sample(patched)
nodes["PSAReport"].execute({{"samples": torch.zeros(1)}}, patched)
nodes["PSACompare"].execute(torch.rand(2, 64, 64, 3), torch.rand(2, 64, 64, 3))
print(sorted(seen))
"""
SAID = {
    "read comfy.settings.json": "`default/comfy.settings.json` in that folder, for the language",
    "read pack": "its own folder",
    "read psa_presets": "the `.yaml` and `.yml` files of `psa_presets` in ComfyUI's user folder",
    "write psa_presets": "to `psa_presets`, when PSA Preset is asked to save",
    "write temp": "PSA Report's preview to ComfyUI's temp folder",
}
NETWORK = {
    "aiohttp", "asyncore", "ftplib", "http", "httpx", "imaplib", "poplib", "requests", "smtplib", "socket",
    "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "webbrowser", "websockets", "xmlrpc", "huggingface_hub",
}  # fmt: skip
PROGRAMS = {"ctypes", "code", "codeop", "dill", "cloudpickle", "marshal", "multiprocessing", "pickle", "pip", "pty",
            "runpy", "shelve", "subprocess"}  # fmt: skip
REQUIREMENTS = [
    "tests/requirements.txt",
    "demo/requirements.txt",
    "demo/comfyui-requirements.txt",
    "benchmarks/requirements.txt",
]


def pack_files() -> list[Path]:
    return [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py")), *sorted((ROOT / "psa_core").rglob("*.py"))]


@pytest.mark.parametrize("path", pack_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_talks_to_a_network_or_runs_programs_is_imported(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
    assert imported & (NETWORK | PROGRAMS) == set()


def test_a_sparse_run_opens_no_connection_and_starts_no_program(comfyui: Path) -> None:
    """From the import of the pack to the end of a run of all nodes but the loaders of weights."""
    program = OFFLINE.format(tests=str(ROOT / "tests"), comfyui=str(comfyui))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_policy_names_every_file_that_the_nodes_open(comfyui: Path, tmp_path: Path) -> None:
    """All nodes but the loaders of weights and the probe, which samples as the patch does."""
    user, temp = tmp_path / "user", tmp_path / "temp"
    (user / "default").mkdir(parents=True)
    (user / "default/comfy.settings.json").write_text('{"Comfy.Locale": "zh"}')
    temp.mkdir()
    program = FILES.format(tests=str(ROOT / "tests"), comfyui=str(comfyui), user=str(user), temp=str(temp))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == sorted(SAID)
    policy = (ROOT / "SECURITY.md").read_text("utf-8")
    assert [said for said in SAID.values() if said not in policy] == []


class Payload:
    """Leaves a trace where a pickle of it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.ckpt", "weights.safetensors", "weights"])
def test_weights_that_could_hold_a_program_are_refused(comfyui: Path, tmp_path: Path, name: str) -> None:
    from psa_pack.nodes.load_cogvideox import _read_tensors

    file, trace = tmp_path / name, tmp_path / "trace"
    torch.save({"a": Payload(trace)}, file)
    with pytest.raises(ValueError) as refused:
        _read_tensors("lora_name", file)
    end = (
        "cannot be read ("
        if name.endswith(".safetensors")
        else "is no .safetensors file; other formats can hold programs"
    )
    assert str(refused.value).startswith(f"lora_name: {name} {end}")
    assert not trace.exists()


def test_only_safetensors_are_offered(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from psa_pack.nodes.load_cogvideox import PSALoadCogVideoX, PSALoadCogVideoXLoRA

    for name in ("a.safetensors", "b.pt", "c.bin", "d.ckpt"):
        (tmp_path / name).touch()
    for kind in ("loras", "diffusion_models"):
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors", ".pt", ".ckpt"})
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for node in (PSALoadCogVideoX, PSALoadCogVideoXLoRA):
        (options,) = [entry.options for entry in node.define_schema().inputs if entry.id.endswith("_name")]
        assert options == ["a.safetensors"]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_what_tests_and_demo_install_has_a_version(name: str) -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
    assert any(lines)
    assert [line for line in filter(None, lines) if not re.match(r"[\w.-]+==\d+(\.\w+)+(;|$)", line)] == []


def test_the_policy_says_where_to_report() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    for said in ("No network", "No code from files", "safetensors", "Report a vulnerability"):
        assert said in text


def test_the_measured_line_coverage_is_enough() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text("utf-8"))
    assert all(part["percent"] > 95 for part in measured["totals"].values())

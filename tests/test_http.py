"""A real ComfyUI over HTTP, as a browser talks to it: the nodes, and prompts with and without the patch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from comfy_server import ComfyError, ComfyServer, Run
from run import find, read_frames, without_patch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
WORKFLOWS = [*sorted((ROOT / "workflows").glob("*.json")), DEMO / "workflow.json"]
FRONTEND_NODES = {"Note", "MarkdownNote"}
MODEL, VAE = "wan_demo.safetensors", "wan_demo_vae.safetensors"

SIZE = (128, 128, 17)  # width, height and frames: 5 x 8 x 8 = 320 tokens, five key blocks
STEPS, BLOCKS = 4, 3
SPARSE = {"start_percent": 0.0, "min_tokens": 0, "backend": "reference"}

Prompt = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def server(comfyui: Path) -> Iterator[ComfyServer]:
    weights = {"diffusion_models": [DEMO / "weights" / MODEL], "vae": [DEMO / "weights" / VAE]}
    with ComfyServer(comfyui, models=weights, custom_nodes=[DEMO / "prompt_node"], cpu=True) as running:
        yield running


@pytest.fixture(scope="module")
def dense(server: ComfyServer) -> Tensor:
    """Latent without the patch; a module-wide first run, before any patched one."""
    return latent(server, server.run(prompt(None)))


def prompt(
    patch: dict[str, Any] | None,
    *,
    seed: int = 1,
    size: tuple[int, int, int] = SIZE,
    steps: int = STEPS,
    cfg: float = 1.0,
) -> Prompt:
    """The demo's prompt, small, with these values at the patch (None: without it), up to the latent."""
    nodes: Prompt = json.loads((DEMO / "workflow_api.json").read_text())
    width, height, length = size
    find(nodes, "EmptyHunyuanLatentVideo")["inputs"] |= {"width": width, "height": height, "length": length}
    find(nodes, "KSampler")["inputs"] |= {"seed": seed, "steps": steps, "cfg": cfg}
    find(nodes, "PSAAttentionPatch")["inputs"] |= {"error_weight": -1.0, "start_percent": -1.0} | (patch or {})
    for class_type in ("VAELoader", "VAEDecode", "SaveAnimatedWEBP"):
        del nodes[node_id(nodes, class_type)]
    nodes["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [node_id(nodes, "KSampler"), 0]}}
    nodes["save"]["inputs"]["filename_prefix"] = "latent"
    return nodes if patch is not None else without_patch(nodes)


def node_id(nodes: Prompt, class_type: str) -> str:
    return next(key for key, node in nodes.items() if node["class_type"] == class_type)


def sampled_anew(nodes: Prompt) -> Prompt:
    """A prompt with the same result that ComfyUI's cache does not know: its shift is set twice."""
    twice: Prompt = json.loads(json.dumps(nodes))
    shift = node_id(twice, "ModelSamplingSD3")
    twice["again"] = {"class_type": "ModelSamplingSD3", "inputs": {**twice[shift]["inputs"], "model": [shift, 0]}}
    find(twice, "KSampler")["inputs"]["model"] = ["again", 0]
    return twice


def latent(server: ComfyServer, run: Run) -> Tensor:
    assert (run.status, run.message) == ("success", "")
    (saved,) = run.outputs["save"]["latents"]
    tensor = load_file(server.output_folder / saved["subfolder"] / saved["filename"])["latent_tensor"]
    assert torch.isfinite(tensor).all()
    return tensor


def distance(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def status(run: Run) -> str:
    """The last text that the patch showed on its node."""
    return run.texts[-1][1]


def last_line(server: ComfyServer) -> str:
    """The line that the latest patched run wrote to the log."""
    return re.findall(r"PSA .* after [\d.]+ s", server.log())[-1]


def unfolded(text: str) -> str:
    """A text without its line breaks, which are where a node's width wants them."""
    return " ".join(text.split())


def test_both_nodes_are_there_with_a_tooltip_on_every_input(server: ComfyServer) -> None:
    info = server.object_info()
    for name in ("PSAAttentionPatch", "PSAPresetLoader"):
        assert info[name]["category"] == "model/patch"
        assert info[name]["description"]
        inputs = [spec for kind in ("required", "optional") for spec in info[name]["input"].get(kind, {}).values()]
        assert inputs
        assert all(spec[1]["tooltip"] for spec in inputs)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_node_and_input_of_a_workflow_exists(server: ComfyServer, path: Path) -> None:
    info = server.object_info()
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] in FRONTEND_NODES:
            continue
        assert node["type"] in info
        described = info[node["type"]]
        inputs = {**described["input"].get("required", {}), **described["input"].get("optional", {})}
        # The button to upload an image is the frontend's own.
        names = [entry["name"] for entry in node["inputs"] if entry["type"] != "IMAGEUPLOAD"]
        assert set(names) <= set(inputs)
        assert set(described["input"].get("required", {})) <= set(names)
        for entry in node["inputs"]:
            if entry["link"] is not None:
                assert inputs[entry["name"]][0] == entry["type"]
        assert [output["type"] for output in node["outputs"]] == described["output"][: len(node["outputs"])]


def test_a_patched_run_at_error_weight_zero_is_the_dense_one(server: ComfyServer, dense: Tensor) -> None:
    run = server.run(prompt(SPARSE | {"error_weight": 0.0}))
    assert distance(latent(server, run), dense) < 1e-5
    assert f"{STEPS * BLOCKS} sparse calls (mean density 1.000, reference); 0 dense calls" in last_line(server)
    assert f"\n{STEPS} of {STEPS} steps sparse\nmean density 1.00 (reference)\nfinished after" in status(run)


def test_a_balanced_run_is_sparse_and_near_the_dense_one(server: ComfyServer, dense: Tensor) -> None:
    run = server.run(prompt(SPARSE | {"error_weight": 0.02}))
    out = latent(server, run)
    assert 0 < distance(out, dense) < 0.2
    counts = re.search(r"(\d+) sparse calls \(mean density (0\.\d+), reference\)", last_line(server))
    assert counts is not None and int(counts[1]) == STEPS * BLOCKS and float(counts[2]) < 0.9
    (line,) = (line for line in server.log().splitlines() if counts[0] in line)
    assert "PSA wan2.1_1.3b balanced: " in line
    assert torch.equal(latent(server, server.run(sampled_anew(prompt(SPARSE | {"error_weight": 0.02})))), out)


def test_off_and_removal_leave_nothing_behind(server: ComfyServer, dense: Tensor) -> None:
    off = server.run(prompt(SPARSE | {"preset": "off"}))
    assert torch.equal(latent(server, off), dense)
    assert status(off) == "PSA off: nothing is changed"
    server.run(prompt(SPARSE | {"error_weight": 0.5}))
    again = server.run(sampled_anew(prompt(None)))
    assert node_id(prompt(None), "KSampler") in again.node_seconds
    assert torch.equal(latent(server, again), dense)
    assert again.texts == []


def test_a_cpu_stays_dense_by_itself_and_says_why(server: ComfyServer, dense: Tensor) -> None:
    run = server.run(prompt(SPARSE | {"backend": "auto"}))
    assert torch.equal(latent(server, run), dense)
    assert "PSA is made for NVIDIA GPUs" in status(run).replace("\n", " ")


@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_one_condition_or_both_in_a_batch(server: ComfyServer, cfg: float) -> None:
    plain = latent(server, server.run(prompt(None, seed=2, cfg=cfg)))
    exact = server.run(prompt(SPARSE | {"error_weight": 0.0}, seed=2, cfg=cfg))
    assert distance(latent(server, exact), plain) < 1e-5
    assert f"{STEPS * BLOCKS} sparse calls" in last_line(server)


def test_a_run_after_an_interrupted_one_knows_nothing_of_it(server: ComfyServer) -> None:
    patch = SPARSE | {"error_weight": 0.02, "dense_blocks": "0"}
    interrupted = server.run(prompt(patch, seed=3, steps=200), on_progress=lambda *_: server.interrupt())
    assert interrupted.status == "interrupted"
    assert re.search(r"PSA .* steps sparse; 320 tokens; interrupted after", server.log())
    # The patch itself comes from ComfyUI's cache now: the same object runs again.
    after = server.run(prompt(patch, seed=4))
    assert node_id(prompt(patch), "PSAAttentionPatch") not in after.node_seconds
    assert f"{STEPS * (BLOCKS - 1)} sparse calls" in last_line(server)
    assert f"{STEPS} dense calls ({STEPS} in dense_blocks); {STEPS} of {STEPS} steps sparse" in last_line(server)
    assert f"dense calls: {STEPS}\nin dense_blocks\n" in status(after)
    fresh = server.run(prompt(patch | {"verbose": True}, seed=4))
    assert torch.equal(latent(server, after), latent(server, fresh))


def test_one_patch_renders_one_resolution_after_another(server: ComfyServer) -> None:
    patch = SPARSE | {"error_weight": 0.0, "end_percent": 0.99}
    for size, tokens in (((160, 96, 9), 3 * 6 * 10), (SIZE, 320)):
        run = server.run(prompt(patch, seed=5, size=size))
        assert f"{STEPS * BLOCKS} sparse calls" in last_line(server)
        assert f"; {tokens} tokens;" in last_line(server)
        plain = server.run(prompt(None, seed=5, size=size))
        assert distance(latent(server, run), latent(server, plain)) < 1e-5


def test_the_preset_loaders_preset_wins(server: ComfyServer) -> None:
    nodes = prompt(SPARSE | {"custom_preset": ["loader", 0]}, seed=6)
    nodes["loader"] = {"class_type": "PSAPresetLoader", "inputs": {"preset": "wan2.1_14b/fast"}}
    assert status(server.run(nodes)).startswith("PSA wan2.1_14b fast\n")


def test_the_status_is_in_the_users_language(server: ComfyServer) -> None:
    nodes = prompt(SPARSE | {"start_percent": 0.5, "error_weight": 0.02}, seed=8)
    english = status(server.run(nodes))
    assert "dense calls: 6\nbefore start_percent 0.5\n" in english
    server.post("/settings/Comfy.Locale", "zh")
    try:
        chinese = status(server.run(sampled_anew(nodes)))
    finally:
        server.post("/settings/Comfy.Locale", "en")
    assert f"{STEPS} 步中 2 步稀疏\n" in chinese
    assert "稠密调用 6 次：\n早于 start_percent 0.5\n" in chinese
    assert "6 dense calls (6 before start_percent 0.5)" in last_line(server)


def with_report(nodes: Prompt, **inputs: Any) -> Prompt:
    """The prompt with a PSA Report between the sampler and what follows."""
    report = {"samples": [node_id(nodes, "KSampler"), 0], "model": [node_id(nodes, "ModelSamplingSD3"), 0]}
    longer: Prompt = json.loads(json.dumps(nodes))
    longer["save"]["inputs"]["samples"] = ["report", 0]
    longer["report"] = {"class_type": "PSAReport", "inputs": {"theme": "light", **report, **inputs}}
    longer["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 2]}}
    return longer


def test_a_report_follows_the_sampler(server: ComfyServer) -> None:
    plain = latent(server, server.run(prompt(SPARSE | {"start_percent": 0.5}, seed=9)))
    run = server.run(with_report(prompt(SPARSE | {"start_percent": 0.5}, seed=9), theme="dark"))
    assert torch.equal(latent(server, run), plain)
    (text,) = run.outputs["text"]["text"]
    assert "2 of 4 steps sparse\n" in text and "dense: 6 before start_percent 0.5\n" in text
    (image,) = run.outputs["report"]["images"]
    with Image.open(server.base / "temp" / image["subfolder"] / image["filename"]) as picture:
        assert picture.width == 1024 and 500 < picture.height < 1400
    # Another seed is another run; the same prompt is none, and what is shown stays.
    other = server.run(with_report(prompt(SPARSE | {"start_percent": 0.5}, seed=10), theme="dark"))
    assert "report" in other.node_seconds
    again = server.run(with_report(prompt(SPARSE | {"start_percent": 0.5}, seed=10), theme="dark"))
    assert "report" not in again.node_seconds
    assert again.outputs["report"]["images"] == other.outputs["report"]["images"]
    assert again.outputs["text"] == other.outputs["text"]


def test_a_report_without_a_patch_says_so(server: ComfyServer) -> None:
    run = server.run(with_report(prompt(None, seed=9)))
    assert run.outputs["text"]["text"][0].startswith("PSA is not on this model\n")


def test_a_picture_comes_out_at_the_end(server: ComfyServer) -> None:
    nodes: Prompt = json.loads((DEMO / "workflow_api.json").read_text())
    find(nodes, "EmptyHunyuanLatentVideo")["inputs"] |= {"width": 96, "height": 96, "length": 9}
    find(nodes, "KSampler")["inputs"]["steps"] = STEPS
    find(nodes, "PSAAttentionPatch")["inputs"] |= SPARSE | {"error_weight": 0.0}
    pictures = []
    for variant in (nodes, without_patch(nodes)):
        run = server.run(variant)
        assert (run.status, run.message) == ("success", "")
        (image,) = run.outputs[node_id(nodes, "SaveAnimatedWEBP")]["images"]
        pictures.append(read_frames(server.output_folder / image["subfolder"] / image["filename"]).astype(int))
    assert pictures[0].shape == (9, 96, 96, 3)
    assert pictures[0].std() > 1
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def probing(nodes: Prompt, sampler: str, share: float, wanted: float) -> Prompt:
    """The prompt with a probe in the place of a sampler, under the same id, and its report shown."""
    nodes = json.loads(json.dumps(nodes))
    nodes[sampler]["class_type"] = "PSAQualityProbe"
    nodes[sampler]["inputs"] |= {"share": share, "wanted_error": wanted}
    nodes[f"report of {sampler}"] = {"class_type": "PreviewAny", "inputs": {"source": [sampler, 1]}}
    return nodes


def report(run: Run, sampler: str) -> str:
    (text,) = run.outputs[f"report of {sampler}"]["text"]
    return str(text)


def measured(text: str) -> float:
    return float(re.search(r"This run with error_weight \S+ had an error of (0\.\d+)", text)[1])  # type: ignore[index]


def test_a_probe_in_the_samplers_place_gives_its_latent_and_a_report(server: ComfyServer) -> None:
    plain = prompt(SPARSE | {"error_weight": 0.02}, seed=8)
    sampler = node_id(plain, "KSampler")
    steps = []
    run = server.run(probing(plain, sampler, 0.5, 0.04), on_progress=lambda node, *step: steps.append((node, *step)))
    assert torch.equal(latent(server, run), latent(server, server.run(plain)))
    assert (sampler, STEPS, STEPS) in steps
    text = report(run, sampler)
    assert f"6 of {STEPS * BLOCKS} sparse calls were compared" in text
    shown = [text for node, text in run.texts if node == sampler][-1]
    assert shown.startswith("error_weight: 0.")
    assert unfolded(text).startswith(f"PSA Quality Probe: wan2.1_1.3b balanced {unfolded(shown)} error_weight |")
    assert "\nmean density " in next(text for node, text in run.texts[::-1] if node != sampler)


def test_the_suggested_preset_gives_the_wanted_error(server: ComfyServer) -> None:
    """A trained model, at a size with enough blocks for a smooth curve of errors; the preset goes by its socket."""
    wanted, size = 0.05, (256, 256, 33)
    nodes = prompt(SPARSE | {"error_weight": 0.05}, seed=9, size=size)
    first = node_id(nodes, "KSampler")
    nodes = probing(nodes, first, 1.0, wanted)  # with a ramp, steps differ too much for half of four to stand for all
    patch, shift = node_id(nodes, "PSAAttentionPatch"), node_id(nodes, "ModelSamplingSD3")
    inputs = nodes[patch]["inputs"] | {"custom_preset": [first, 2], "error_weight": -1.0}
    nodes["patch 2"] = {"class_type": "PSAAttentionPatch", "inputs": inputs}
    nodes["shift 2"] = {"class_type": "ModelSamplingSD3", "inputs": nodes[shift]["inputs"] | {"model": ["patch 2", 0]}}
    nodes["probe 2"] = {"class_type": "KSampler", "inputs": nodes[first]["inputs"] | {"model": ["shift 2", 0]}}
    nodes = probing(nodes, "probe 2", 1.0, wanted)
    run = server.run(nodes)
    assert run.status == "success", run.message
    before, after = report(run, first), report(run, "probe 2")
    assert after.startswith("PSA Quality Probe: wan2.1_1.3b balanced-probed\n")
    assert abs(measured(before) / wanted - 1) > 0.3
    assert measured(after) == pytest.approx(wanted, rel=0.1)


def test_a_probe_that_is_interrupted_leaves_the_next_run_alone(server: ComfyServer) -> None:
    plain = prompt(SPARSE | {"error_weight": 0.02}, seed=10)
    sampler = node_id(plain, "KSampler")
    endless = probing(plain, sampler, 1.0, 0.04)
    endless[sampler]["inputs"]["steps"] = 500
    interrupted = server.run(endless, on_progress=lambda *_: server.interrupt())
    assert interrupted.status == "interrupted"
    dense = latent(server, server.run(prompt(None, seed=10)))
    sparse = server.run(plain)
    assert 0 < distance(latent(server, sparse), dense) < 0.2
    assert f"{STEPS} of {STEPS} steps sparse" in status(sparse)


def test_a_probe_of_an_unpatched_model_says_what_to_connect(server: ComfyServer) -> None:
    plain = prompt(None, seed=11)
    run = server.run(probing(plain, node_id(plain, "KSampler"), 0.5, 0.04))
    assert (run.status, run.message.partition(";")[0]) == ("error", "PSAQualityProbe: model: it is not patched")


def test_dense_and_psa_are_compared_on_the_picture(server: ComfyServer) -> None:
    """The bundled comparison, with the demo's model, prompts and size."""
    nodes: Prompt = json.loads((DEMO / "workflow_api.json").read_text())
    find(nodes, "EmptyHunyuanLatentVideo")["inputs"] |= {"width": 128, "height": 96, "length": 5}
    find(nodes, "PSAAttentionPatch")["inputs"] |= SPARSE | {"error_weight": 0.02}
    sampler, decoder = node_id(nodes, "KSampler"), node_id(nodes, "VAEDecode")
    saver, patch = node_id(nodes, "SaveAnimatedWEBP"), node_id(nodes, "PSAAttentionPatch")
    nodes[sampler]["inputs"]["steps"] = STEPS
    shift = nodes[node_id(nodes, "ModelSamplingSD3")]["inputs"]
    nodes["dense shift"] = {
        "class_type": "ModelSamplingSD3", "inputs": shift | {"model": nodes[patch]["inputs"]["model"]},
    }  # fmt: skip
    nodes["dense sampler"] = {
        "class_type": "KSampler",
        "inputs": {**nodes[sampler]["inputs"], "model": ["dense shift", 0]},
    }
    nodes["dense"] = {
        "class_type": "VAEDecode",
        "inputs": {**nodes[decoder]["inputs"], "samples": ["dense sampler", 0]},
    }
    nodes["save dense"] = {
        "class_type": "SaveAnimatedWEBP",
        "inputs": {**nodes[saver]["inputs"], "images": ["dense", 0]},
    }
    nodes["save psa"] = {"class_type": "SaveAnimatedWEBP", "inputs": {**nodes[saver]["inputs"]}}
    nodes["compare"] = {"class_type": "PSACompare", "inputs": {"dense": ["dense", 0], "psa": [decoder, 0]}}
    nodes["figures"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 1]}}
    nodes[saver]["inputs"]["images"] = ["compare", 0]
    run = server.run(nodes)
    assert (run.status, run.message) == ("success", "")

    def video(node: str) -> np.ndarray:
        (image,) = run.outputs[node]["images"]
        return read_frames(server.output_folder / image["subfolder"] / image["filename"])

    dense, psa, both = video("save dense"), video("save psa"), video(saver)
    (figures,) = run.outputs["figures"]["text"]
    similar = np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in zip(dense, psa, strict=True)])
    expected = f"5 frames: PSNR {peak_signal_noise_ratio(dense, psa):.1f} dB, SSIM {similar:.3f}; worst, frame "
    assert figures.startswith(expected)
    shown = figures.replace("; worst", " worst")  # on the node it stands in lines of its own
    assert ("compare", shown) in [(node, unfolded(text)) for node, text in run.texts]
    bar = (both.shape[1] - 96) // 2
    assert np.abs(both[:, bar:-bar].astype(int) - np.concatenate((dense, psa), axis=2)).max() <= 1
    (ROOT / "tests/out").mkdir(exist_ok=True)
    Image.fromarray(both[-1]).save(ROOT / "tests/out/comparison.png")


def refusal(server: ComfyServer, nodes: Prompt) -> str:
    """What ComfyUI says to a prompt that it refuses, at once or when it comes to the patch."""
    try:
        run = server.run(nodes)
    except ComfyError as error:
        return str(error)
    assert run.status == "error"
    assert run.message.startswith("PSAAttentionPatch: ")
    assert node_id(nodes, "KSampler") not in run.node_seconds
    return run.message


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"start_percent": 0.6, "end_percent": 0.4}, ["start_percent: 0.6 is not below end_percent, 0.4"]),
        ({"start_percent": -0.5}, ["start_percent: -0.5 is not a number from 0 to 1; -1 takes the preset's value"]),
        ({"start_percent": 1.5}, ["start_percent", "1.5", "bigger than max of 1.0"]),
        ({"error_weight": -2}, ["error_weight", "-2", "smaller than min of -1"]),
        ({"dense_blocks": "first"}, ["dense_blocks: 'first' in 'first' is neither a block"]),
        ({"dense_blocks": "3"}, ["dense_blocks: 3 is not a block of this model, which has 3"]),
        ({"preset": "best"}, ["preset", "'best'", "balanced", "quality", "fast"]),
        ({"backend": "cuda"}, ["backend", "'cuda'", "auto", "triton", "reference"]),
    ],
)
def test_bad_values_are_refused_before_sampling(server: ComfyServer, patch: dict[str, Any], said: list[str]) -> None:
    message = refusal(server, prompt(patch, seed=7))
    assert [part for part in said if part not in message] == []


def test_a_preset_that_is_not_there_is_refused_at_the_door(server: ComfyServer) -> None:
    nodes = prompt(SPARSE | {"custom_preset": ["loader", 0]})
    nodes["loader"] = {"class_type": "PSAPresetLoader", "inputs": {"preset": "user/mine/best"}}
    with pytest.raises(ComfyError, match="user/mine/best"):
        server.run(nodes)

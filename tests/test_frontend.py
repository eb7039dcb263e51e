"""The bundled workflow and the demo's in ComfyUI's frontend, in a headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_server import ComfyServer
from install_browser import find_browser, missing_reason

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
PICTURES = ROOT / "tests/out"
TEMPLATE = "psa_wan2.1_t2v_1.3b"
BYPASSED, ALWAYS = 4, 0


def embedded_models() -> list[dict[str, str]]:
    nodes = [node for path in (ROOT / "workflows").glob("*.json") for node in json.loads(path.read_text())["nodes"]]
    return [model for node in nodes for model in node["properties"].get("models", [])]


@pytest.fixture(scope="module")
def frontend(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if find_browser() is None:
        pytest.skip(missing_reason())
    pytest.importorskip("playwright", reason="playwright is not installed; `make test` installs it")
    from browser import open_frontend

    weights = {
        "diffusion_models": [DEMO / "weights/wan_demo.safetensors"],
        "vae": [DEMO / "weights/wan_demo_vae.safetensors"],
    }
    # Files by the names of the bundled workflows' models, or a list of missing ones covers the canvas.
    for model in embedded_models():
        file = Path(model["directory"], model["name"])
        (empty := tmp_path_factory.getbasetemp() / file.name).touch()
        weights.setdefault(str(file.parent), []).append(empty)
    with (
        ComfyServer(comfyui, models=weights, custom_nodes=[DEMO / "prompt_node"], cpu=True) as server,
        open_frontend(server) as frontend,
    ):
        yield frontend


@pytest.fixture
def demo(frontend: Any) -> Any:
    """The demo's workflow on the canvas, small, sparse from the first step."""
    frontend.load(json.loads((DEMO / "workflow.json").read_text()))
    frontend.set_values("EmptyHunyuanLatentVideo", width=128, height=128, length=9)
    frontend.set_values("KSampler", steps=3)
    frontend.set_values("PSAAttentionPatch", start_percent=0.0, error_weight=0.1, backend="reference")
    return frontend


def test_the_template_browser_opens_the_workflow_with_no_node_missing(frontend: Any) -> None:
    frontend.open_templates()
    entry = frontend.page.get_by_text(TEMPLATE, exact=True).first
    entry.wait_for()
    entry.scroll_into_view_if_needed()  # pictures below the fold are not loaded
    thumbnail = frontend.page.get_by_alt_text(TEMPLATE).first
    thumbnail.wait_for()
    assert thumbnail.evaluate("async (image) => { await image.decode(); return image.naturalWidth }") == 256
    frontend.screenshot(PICTURES / "templates.png")
    entry.click()
    frontend.page.wait_for_function("app.graph.nodes.some((node) => node.type === 'PSAAttentionPatch')")
    workflow = json.loads((ROOT / f"workflows/{TEMPLATE}.json").read_text())
    assert sorted(frontend.node_types()) == sorted(node["type"] for node in workflow["nodes"])
    assert frontend.missing_types() == []
    assert frontend.page.get_by_text(re.compile("missing (model|node)", re.IGNORECASE)).count() == 0
    frontend.fit(-500, -60, 0.55)
    frontend.screenshot(PICTURES / "workflow.png")


@pytest.mark.parametrize(
    ("name", "latent_node", "size", "fps"),
    [
        (TEMPLATE, "EmptyHunyuanLatentVideo", (1280, 720, 69), 16),
        ("psa_wan2.1_t2v_14b", "EmptyHunyuanLatentVideo", (1280, 720, 69), 16),
        ("psa_wan2.2_ti2v_5b", "Wan22ImageToVideoLatent", (1280, 704, 121), 24),
    ],
)
def test_a_bundled_workflow_asks_for_what_its_note_says(
    frontend: Any, name: str, latent_node: str, size: tuple[int, int, int], fps: int
) -> None:
    frontend.load(json.loads((ROOT / f"workflows/{name}.json").read_text()))
    assert frontend.missing_types() == []
    prompt = {node["class_type"]: node["inputs"] for node in frontend.prompt().values()}
    latent = prompt[latent_node]
    assert (latent["width"], latent["height"], latent["length"]) == size
    assert (prompt["KSampler"]["steps"], prompt["KSampler"]["cfg"]) == (50, 5)
    assert prompt["ModelSamplingSD3"]["shift"] == 5
    assert prompt["PSAAttentionPatch"].items() >= {"preset": "balanced", "error_weight": -1, "min_tokens": -1}.items()
    assert prompt["CreateVideo"]["fps"] == fps


EXPERTS = ((1280, 768, 69), 16)
COMPLEX = {
    "psa_wan2.1_i2v_14b": ((1280, 720, 69), 16, 50, [5], [5]),
    "psa_wan2.2_a14b_t2v": (*EXPERTS, 40, [4, 3], [12, 12]),
    "psa_wan2.2_a14b_i2v": (*EXPERTS, 40, [4, 3], [5, 5]),
    "psa_wan2.2_a14b_t2v_4steps": (*EXPERTS, 4, [1, 1], [5, 5]),
    "psa_wan2.2_a14b_i2v_4steps": (*EXPERTS, 4, [1, 1], [5, 5]),
    "psa_cogvideox_5b": ((720, 480, 49), 8, 50, [6], []),
    "psa_cogvideox1.5_5b": ((1360, 768, 81), 8, 50, [6], []),
    "psa_cogvideox_5b_4steps": ((720, 480, 49), 8, 4, [1], []),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_a_generated_workflow_runs_the_model_as_officially(frontend: Any, name: str) -> None:
    size, fps, steps, cfgs, shifts = COMPLEX[name]
    frontend.load(json.loads((ROOT / f"workflows/{name}.json").read_text()))
    assert frontend.missing_types() == []
    nodes = frontend.prompt()

    def inputs(*kinds: str) -> list[dict[str, Any]]:
        return [node["inputs"] for node in nodes.values() if node["class_type"] in kinds]

    (latent,) = inputs("EmptyHunyuanLatentVideo", "WanImageToVideo")
    assert (latent["width"], latent["height"], latent["length"]) == size
    assert [video["fps"] for video in inputs("CreateVideo")] == [fps]
    samplers = inputs("KSampler", "KSamplerAdvanced")
    assert [(sampler["steps"], sampler["cfg"]) for sampler in samplers] == [(steps, cfg) for cfg in cfgs]
    assert [sampling["shift"] for sampling in inputs("ModelSamplingSD3")] == shifts
    # Every sampler runs a patched model of its own; two of them split one schedule where the noise is handed over.
    assert {nodes[sampler["model"][0]]["class_type"] for sampler in samplers} == {"PSAAttentionPatch"}
    assert len({sampler["model"][0] for sampler in samplers}) == len(samplers)
    if len(samplers) == 2:
        high, low = samplers
        assert (high["start_at_step"], high["end_at_step"]) == (0, low["start_at_step"])
        assert (high["add_noise"], high["return_with_leftover_noise"]) == ("enable", "enable")
        assert (low["add_noise"], low["return_with_leftover_noise"]) == ("disable", "disable")
        assert nodes[low["latent_image"][0]]["inputs"] == high
    assert name.endswith("4steps") == any(
        loader["preset"].endswith("/four_steps") for loader in inputs("PSAPresetLoader")
    )


def test_the_comparison_gives_both_samplers_the_same_but_the_model(frontend: Any) -> None:
    frontend.load(json.loads((ROOT / "workflows/psa_compare_wan2.1_1.3b.json").read_text()))
    assert frontend.missing_types() == []
    frontend.fit(-480, -60, 0.6)
    frontend.screenshot(PICTURES / "comparison_workflow.png")
    nodes = frontend.prompt()
    by_type = {node["class_type"]: node["inputs"] for node in nodes.values()}
    dense, psa = (node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    models = [nodes[sampler.pop("model")[0]]["class_type"] for sampler in (dense, psa)]
    assert models == ["ModelSamplingSD3", "PSAAttentionPatch"]
    assert dense == psa and (dense["steps"], dense["cfg"]) == (50, 5)
    assert nodes[dense["seed"][0]]["class_type"] == "PrimitiveInt"
    latent = by_type["EmptyHunyuanLatentVideo"]
    assert (latent["width"], latent["height"], latent["length"]) == (832, 480, 81)
    decoders = [nodes[by_type["PSACompare"][name][0]]["inputs"] for name in ("dense", "psa")]
    assert [nodes[decoder["samples"][0]]["_meta"]["title"] for decoder in decoders] == ["Dense", "PSA"]
    assert by_type["CreateVideo"]["fps"] == 16


def test_the_demo_runs_from_the_frontend_and_the_node_says_what_it_did(demo: Any) -> None:
    assert demo.missing_types() == []
    record = demo.run()
    assert record["status"]["status_str"] == "success"
    text = demo.page.get_by_text(re.compile(r"mean density 0\.\d+ \(reference\)")).first
    text.wait_for()
    assert "3 of 3 steps sparse" in text.inner_text()
    demo.page.wait_for_timeout(1000)  # for the preview of the video
    demo.screenshot(PICTURES / "demo.png")


def test_a_bypassed_patch_is_not_part_of_the_prompt(demo: Any) -> None:
    demo.set_mode("PSAAttentionPatch", BYPASSED)
    prompt = demo.prompt()
    loader = next(key for key, node in prompt.items() if node["class_type"] == "UNETLoader")
    assert "PSAAttentionPatch" not in {node["class_type"] for node in prompt.values()}
    assert [node["inputs"]["model"] for node in prompt.values() if node["class_type"] == "ModelSamplingSD3"] == [
        [loader, 0]
    ]
    demo.set_values("KSampler", seed=2)
    record = demo.run()
    assert record["status"]["status_str"] == "success"
    assert "PSAAttentionPatch" not in json.dumps(record["prompt"][2])
    demo.set_mode("PSAAttentionPatch", ALWAYS)
    assert "PSAAttentionPatch" in {node["class_type"] for node in demo.prompt().values()}


def test_node_help_is_served(frontend: Any) -> None:
    for node in ("PSAAttentionPatch", "PSAPresetLoader", "PSAQualityProbe", "PSACompare"):
        response = frontend.page.request.get(f"{frontend.server.url}/extensions/psa-attention/docs/{node}/en.md")
        assert response.ok
        assert node.removeprefix("PSA").split("P")[0] in response.text()

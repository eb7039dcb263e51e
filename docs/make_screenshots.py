"""Make the documents' screenshots: each step of a new user, in ComfyUI's frontend.

    make screenshots
    make screenshots SCREENSHOT_ARGUMENTS="--frontend FOLDER"

Writes the PNG files beside this one. Needs the browser that `make install-tests` installs, and a Chinese font. What is
rendered is the demo's small model: on a GPU with the kernels, elsewhere with the reference. FOLDER is the folder
``static`` of another comfyui-frontend-package: 1.32.9, that of the tests, does not translate the nodes of packs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from make_workflows import Graph, Output
from PIL import Image

from browser import Frontend, open_frontend
from comfy_server import ComfyServer

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
WORKFLOWS = HERE.parent / "workflows"
TEMPLATE = "psa_wan2.1_t2v_1.3b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontend", type=Path, help="folder of another frontend")
    args = parser.parse_args()
    options = ["--front-end-root", str(args.frontend.resolve())] if args.frontend else []
    models = {
        "diffusion_models": [DEMO / "weights/wan_demo.safetensors"],
        "vae": [DEMO / "weights/wan_demo_vae.safetensors"],
    }
    comfyui = Path(os.environ.get("COMFYUI_PATH") or HERE.parent / ".comfyui")
    with tempfile.TemporaryDirectory() as folder:
        # Empty files by the names of the bundled workflows' models, or a list of missing ones covers the canvas.
        for path in sorted(WORKFLOWS.glob("*.json")):
            for node in json.loads(path.read_text("utf-8"))["nodes"]:
                for model in node["properties"].get("models", []):
                    (empty := Path(folder) / model["directory"] / model["name"]).parent.mkdir(
                        parents=True, exist_ok=True
                    )
                    if not empty.exists():
                        empty.touch()
                        models.setdefault(model["directory"], []).append(empty)
        with ComfyServer(comfyui, models=models, custom_nodes=[DEMO / "prompt_node"], arguments=options) as server:
            with open_frontend(server, 1600, 900) as frontend:
                templates(frontend)
                opened_template(frontend)
            with open_frontend(server, 1600, 660) as frontend:
                run(frontend, "node.png")
                report(frontend, "report.png")
            with open_frontend(server, 1600, 660) as frontend:
                run(frontend, "node.png")  # again, without the report and with its seed
                changed_preset(frontend)
            with open_frontend(server, 1600, 660, language="zh") as frontend:
                run(frontend, "node_zh.png")
                report(frontend, "report_zh.png")
            with open_frontend(server, 1600, 800) as frontend:
                probe(frontend)
                comparison(frontend)


def templates(frontend: Frontend) -> None:
    """The template browser with the pack's workflows."""
    frontend.open_templates()
    frontend.page.get_by_text("psa-attention", exact=True).first.click()
    frontend.page.get_by_text(TEMPLATE, exact=True).first.scroll_into_view_if_needed()
    frontend.page.get_by_alt_text(TEMPLATE).first.wait_for()
    frontend.page.wait_for_timeout(1500)  # until the pictures are there
    save(frontend, "templates.png")


def opened_template(frontend: Frontend) -> None:
    """The template that a click opens."""
    frontend.page.get_by_text(TEMPLATE, exact=True).first.click()
    frontend.page.wait_for_function("app.graph.nodes.some((node) => node.type === 'PSAAttentionPatch')")
    frontend.page.set_viewport_size({"width": 1980, "height": 760})
    frontend.page.wait_for_timeout(1000)
    frontend.fit(left=-560, top=-150, scale=0.7)
    save(frontend, "workflow.png")


def run(frontend: Frontend, name: str) -> None:
    """The demo's workflow, shorter than it is, after a run: what the node says about it."""
    frontend.load(json.loads((DEMO / "workflow.json").read_text("utf-8")))
    frontend.set_values("EmptyHunyuanLatentVideo", length=17)
    frontend.set_values("PSAAttentionPatch", backend="reference" if frontend.server.cpu else "auto")
    # Room for what the node is going to say.
    frontend.place("Positive prompt", 60, 250, 270, 82)
    frontend.place("Negative prompt", 60, 390, 270, 82)
    frontend.place("PSAAttentionPatch", 390, 100, 300, 430)
    run_to_the_end(frontend)
    frontend.fit(left=-30, top=-80, scale=0.93)
    save(frontend, name)


def report(frontend: Frontend, name: str) -> None:
    """PSA Report after the sampler, and what it shows of a run."""
    frontend.place("VAEDecode", 2100, 100, 140, 46)
    frontend.place("SaveAnimatedWEBP", 2100, 220, 420, 420)
    frontend.add("PSAReport", {"samples": ("KSampler", 0), "model": ("PSAAttentionPatch", 0)}, (1390, 100, 560, 600))
    frontend.set_values("KSampler", seed=2)  # or nothing would be sampled anew
    run_to_the_end(frontend)
    frontend.fit(left=310, top=-80, scale=0.88)
    save(frontend, name)


def changed_preset(frontend: Frontend) -> None:
    """Another preset, opened from its list, and what the node says after the next run."""
    frontend.set_values("PSAAttentionPatch", preset="quality", error_weight=-1.0, start_percent=-1.0)
    run_to_the_end(frontend)
    frontend.fit(left=-330, top=-80, scale=0.93)
    frontend.click_widget("PSAAttentionPatch", "preset")
    frontend.page.wait_for_timeout(500)
    save(frontend, "preset.png")


def probe(frontend: Frontend) -> None:
    """PSA Quality Probe in the sampler's place, its report beside it."""
    graph, model, common = demo_graph(frontend)
    samples = graph.add("PSAQualityProbe", (680, 0), (320, 650), model=model, **common, share=0.2)
    graph.nodes[-1]["widgets_values"][1] = "fixed"
    graph.add("PreviewAny", (1040, 0), (560, 640), "Report", source=(samples[0], 1))
    frontend.load(graph.document("probe"))
    run_to_the_end(frontend)
    frontend.fit(left=-110, top=-170, scale=0.9)
    save(frontend, "probe.png")


def comparison(frontend: Frontend) -> None:
    """The same seed dense and with PSA, side by side."""
    graph, model, common = demo_graph(frontend)
    shift = next(node for node in graph.nodes if node["type"] == "ModelSamplingSD3")
    vae = graph.add("VAELoader", (680, 640), (280, 58), vae_name="wan_demo_vae.safetensors")
    common["seed"] = graph.add("PrimitiveInt", (330, 500), (300, 82), "Seed of both", value=1)
    graph.nodes[-1]["widgets_values"] = [1, "fixed"]
    videos = []
    for row, title, source in ((0, "Dense", (shift["id"], 0)), (1, "PSA", model)):
        samples = graph.add("KSampler", (680, 320 * row), (280, 262), title, model=source, **common)
        videos.append(graph.add("VAEDecode", (1000, 100 * row), (200, 46), f"{title} video", samples=samples, vae=vae))
    images = graph.add("PSACompare", (1000, 200), (220, 220), dense=videos[0], psa=videos[1])
    graph.add("SaveAnimatedWEBP", (1240, 0), (560, 420), images=images, fps=16.0, filename_prefix="comparison")
    frontend.load(graph.document("comparison"))
    run_to_the_end(frontend)
    frontend.fit(left=-110, top=-170, scale=0.82)
    save(frontend, "comparison.png")


def demo_graph(frontend: Frontend) -> tuple[Graph, Output, dict[str, Any]]:
    """The demo's workflow up to the sampler: the graph, the patched model, and what samplers take."""
    graph = Graph(frontend.server.object_info(), "0.3.75")
    model = graph.add("UNETLoader", (0, 0), (280, 82), unet_name="wan_demo.safetensors")
    model = graph.add("ModelSamplingSD3", (0, 130), (280, 58), model=model, shift=3)
    backend = "reference" if frontend.server.cpu else "auto"
    model = graph.add(
        "PSAAttentionPatch", (330, 0), (300, 440), model=model, error_weight=0.004, start_percent=0.3, min_tokens=0,
        backend=backend,
    )  # fmt: skip
    positive = graph.add("PSADemoPrompt", (0, 260), (280, 82), "Positive prompt", subject="bunny")
    negative = graph.add("PSADemoPrompt", (0, 390), (280, 82), "Negative prompt", subject="nothing")
    latent = graph.add("EmptyHunyuanLatentVideo", (0, 520), (280, 130), width=384, height=256, length=17)
    common = {"positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 20, "cfg": 1.0}
    return graph, model, common | {"sampler_name": "euler", "scheduler": "simple"}


def run_to_the_end(frontend: Frontend) -> None:
    record = frontend.run(timeout=600)
    if record["status"]["status_str"] != "success":
        raise SystemExit(f"the demo workflow failed: {record['status']['messages']}")
    frontend.page.wait_for_timeout(4000)  # until the video is loaded and the notice of the finished job is gone


def save(frontend: Frontend, name: str) -> None:
    frontend.screenshot(HERE / name)
    with Image.open(HERE / name) as picture:
        picture.convert("RGB").save(HERE / name, optimize=True)


if __name__ == "__main__":
    main()

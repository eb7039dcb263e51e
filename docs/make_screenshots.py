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

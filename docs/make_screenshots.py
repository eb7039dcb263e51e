"""Make the README's screenshots: the demo workflow after a run, and the bundled workflow, in ComfyUI's frontend.

    make screenshots

Writes node.png and workflow.png beside this file. Needs the browser that `make install-tests` installs.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from browser import Frontend, open_frontend
from comfy_server import ComfyServer

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
BUNDLED = HERE.parent / "workflows/psa_wan2.1_t2v_1.3b.json"


def main() -> None:
    bundled = json.loads(BUNDLED.read_text())
    models = {
        "diffusion_models": [DEMO / "weights/wan_demo.safetensors"],
        "vae": [DEMO / "weights/wan_demo_vae.safetensors"],
    }
    comfyui = Path(os.environ.get("COMFYUI_PATH") or HERE.parent / ".comfyui")
    with tempfile.TemporaryDirectory() as folder:
        # Empty files by the names of the bundled workflow's models, or a list of missing ones covers the canvas.
        for node in bundled["nodes"]:
            for model in node["properties"].get("models", []):
                (empty := Path(folder) / model["name"]).touch()
                models.setdefault(model["directory"], []).append(empty)
        with ComfyServer(comfyui, models=models, custom_nodes=[DEMO / "prompt_node"]) as server:
            with open_frontend(server, 1600, 660) as frontend:
                picture_of_the_demo(frontend)
            with open_frontend(server, 1980, 760) as frontend:
                frontend.load(bundled)
                frontend.fit(left=-560, top=-150, scale=0.7)
                frontend.screenshot(HERE / "workflow.png")


def picture_of_the_demo(frontend: Frontend) -> None:
    """Run the demo's workflow, shorter than it is, and show what the node says about it."""
    frontend.load(json.loads((DEMO / "workflow.json").read_text()))
    frontend.set_values("EmptyHunyuanLatentVideo", length=17)
    frontend.set_values("PSAAttentionPatch", backend="reference" if frontend.server.cpu else "auto")
    # Room for what the node is going to say.
    frontend.place("Positive prompt", 60, 250, 270, 82)
    frontend.place("Negative prompt", 60, 390, 270, 82)
    frontend.place("PSA Attention Patch", 390, 100, 300, 400)
    record = frontend.run(timeout=600)
    if record["status"]["status_str"] != "success":
        raise SystemExit(f"the demo workflow failed: {record['status']['messages']}")
    frontend.fit(left=-30, top=-80, scale=0.93)
    frontend.page.wait_for_timeout(4000)  # until the video is loaded and the notice of the finished job is gone
    frontend.screenshot(HERE / "node.png")


if __name__ == "__main__":
    main()

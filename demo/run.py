"""Render the demo video in a real ComfyUI twice, dense and with PSA, at the same seed, and compare the two.

    make demo                        installs what is needed, then runs this
    python demo/run.py --help        in an environment that can run ComfyUI

Writes compare.webp, contact_sheet.png and results.json, and prints a table. The workflow departs from `balanced` in
three values, since the demo's video has 4992 tokens where the presets are made for 32760: a token limit of 0, a larger
error_weight, and the official share of dense steps. ``--preset`` takes a preset as it is, but for the token limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from comfy_server import ComfyServer, Run

HERE = Path(__file__).resolve().parent
WORKFLOW = HERE / "workflow_api.json"
WEIGHTS = HERE / "weights"
PATCH, SAMPLER, SAVER, REPORT = "PSAAttentionPatch", "KSampler", "SaveAnimatedWEBP", "PSAReport"
RUN_KEY = "psa_run"  # where PSA Report's entry in ComfyUI's history holds the run's numbers
LABEL_HEIGHT = 24
SHEET_COLUMNS = 5

Workflow = dict[str, dict[str, Any]]
Frames = np.ndarray  # [frames, height, width, 3], uint8


@dataclass(frozen=True)
class Rendering:
    """One rendered video.

    Args:
        frames: Its pictures.
        seconds: Duration of the sampler.
        peak_mib: Peak memory of the whole prompt.
        record: PSA's own numbers of the run; None for dense.
    """

    frames: Frames
    seconds: float
    peak_mib: float
    record: dict[str, Any] | None


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    workflow = json.loads(WORKFLOW.read_text())
    configure(workflow, args)
    models = {
        "diffusion_models": [WEIGHTS / "wan_demo.safetensors"],
        "vae": [WEIGHTS / "wan_demo_vae.safetensors"],
    }
    with ComfyServer(args.comfyui, models=models, custom_nodes=[HERE / "prompt_node"]) as server:
        version = server.version()
        print(f"ComfyUI {version} on a {'CPU' if server.cpu else 'GPU'}", flush=True)
        if server.cpu:  # where the node, left to itself, keeps attention dense
            find(workflow, PATCH)["inputs"]["backend"] = "reference"
        else:  # kernels are compiled and loaded on first use
            warm_up = json.loads(json.dumps(workflow))
            find(warm_up, SAMPLER)["inputs"]["seed"] += 1
            render(server, without_patch(warm_up), "warming up, dense")
            render(server, with_report(warm_up), "warming up, PSA")
        dense = render(server, without_patch(workflow), "dense")
        psa = render(server, with_report(workflow), "PSA")
    results = compare(dense, psa, version)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    name = f"PSA {args.preset}" if args.preset else "PSA"
    labels = f"dense, {dense.seconds:.1f} s", f"{name}, {psa.seconds:.1f} s"
    save_comparison(dense.frames, psa.frames, labels, args.out / "compare.webp")
    save_sheet(dense.frames, psa.frames, args.out / "contact_sheet.png")
    print_table(results, args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the results")
    parser.add_argument("--subject", default="bunny", help="what to render: bunny, driver, cyclist, balls or orbits")
    parser.add_argument("--preset", help="a preset with its own numbers instead: balanced, quality or fast")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument(
        "--comfyui",
        type=Path,
        default=Path(os.environ.get("COMFYUI_PATH") or HERE.parent / ".comfyui"),
        help="ComfyUI's folder; by default COMFYUI_PATH, else the one that demo/install.py fetches",
    )
    args = parser.parse_args()
    if not (args.comfyui / "main.py").is_file():
        parser.error(f"--comfyui: {args.comfyui} has no main.py; run demo/install.py or set COMFYUI_PATH")
    return args


def find(workflow: Workflow, class_type: str) -> dict[str, Any]:
    """The workflow's only node of a type."""
    return next(node for node in workflow.values() if node["class_type"] == class_type)


def configure(workflow: Workflow, args: argparse.Namespace) -> None:
    find(workflow, "PSADemoPrompt")["inputs"]["subject"] = args.subject  # the first one is the positive
    if args.preset:
        find(workflow, PATCH)["inputs"] |= {"preset": args.preset, "error_weight": -1.0, "start_percent": -1.0}
    find(workflow, SAMPLER)["inputs"] |= {"seed": args.seed, "steps": args.steps}


def without_patch(workflow: Workflow) -> Workflow:
    """The workflow as it was before the patch was dropped in: its model goes on to where the patch's went."""
    patch_id = next(key for key, node in workflow.items() if node["class_type"] == PATCH)
    model = workflow[patch_id]["inputs"]["model"]
    plain = json.loads(json.dumps({key: node for key, node in workflow.items() if key != patch_id}))
    for node in plain.values():
        for name, value in node["inputs"].items():
            if value == [patch_id, 0]:
                node["inputs"][name] = model
    return plain


def with_report(workflow: Workflow) -> Workflow:
    """The workflow with PSA Report after its sampler, which says in numbers what PSA did."""
    ids = {node["class_type"]: key for key, node in workflow.items()}
    inputs = {"samples": [ids[SAMPLER], 0], "model": find(workflow, SAMPLER)["inputs"]["model"], "theme": "dark"}
    return {**workflow, "report": {"class_type": REPORT, "inputs": inputs}}


def render(server: ComfyServer, workflow: Workflow, title: str) -> Rendering:
    """Queue a workflow, wait for it, and read its video back."""
    ids = {node["class_type"]: key for key, node in workflow.items()}
    show = sys.stderr.isatty()

    def on_progress(node: str, value: int, maximum: int) -> None:
        if show and node == ids[SAMPLER]:
            print(f"\r{title}: step {value} of {maximum} ", end="", file=sys.stderr, flush=True)

    run: Run = server.run(workflow, on_progress=on_progress)
    if show:
        print(file=sys.stderr)
    if run.status != "success":
        raise SystemExit(f"{title}: {run.message}\n{server.log()[-4000:]}")
    (record,) = run.outputs[ids[REPORT]][RUN_KEY] if REPORT in ids else (None,)
    video = run.outputs[ids[SAVER]]["images"][0]
    frames = read_frames(server.output_folder / video["subfolder"] / video["filename"])
    seconds = run.node_seconds[ids[SAMPLER]]
    print(f"{title}: {seconds:.1f} s sampling, {run.seconds:.1f} s in all", flush=True)
    return Rendering(frames, seconds, run.peak_mib, record)


def read_frames(path: Path) -> Frames:
    with Image.open(path) as video:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(video)])


def compare(dense: Rendering, psa: Rendering, version: str) -> dict[str, Any]:
    """Everything that results.json holds."""
    record = psa.record
    if record is None or not record["sparse_calls"]:
        raise SystemExit(f"PSA took no part in its run: {record or 'it has no record'}")
    ssim = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(dense.frames, psa.frames, strict=True)]
    return {
        "dense_seconds": round(dense.seconds, 3),
        "psa_seconds": round(psa.seconds, 3),
        "density": round(record["density"], 3),
        "sparse_steps_share": record["sparse_steps"] / record["steps"],
        "psnr_db": round(float(peak_signal_noise_ratio(dense.frames, psa.frames)), 3),
        "ssim": round(float(np.mean(ssim)), 5),
        "peak_mib": round(psa.peak_mib, 1),
        "dense_peak_mib": round(dense.peak_mib, 1),
        "backend": record["backend"],
        "comfyui_version": version,
    }


def save_comparison(dense: Frames, psa: Frames, labels: tuple[str, str], path: Path, fps: float = 16.0) -> None:
    """Animated WEBP with both videos side by side under their labels."""
    bars = [label_bar(label, dense.shape[2]) for label in labels]
    pictures = [
        Image.fromarray(np.hstack([np.vstack((bar, frame)) for bar, frame in zip(bars, pair, strict=True)]))
        for pair in zip(dense, psa, strict=True)
    ]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=85)


def label_bar(text: str, width: int) -> np.ndarray:
    bar = Image.new("RGB", (width, LABEL_HEIGHT), "black")
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(bar).text((width / 2, LABEL_HEIGHT / 2), text, "white", font, anchor="mm")
    return np.asarray(bar)


def save_sheet(dense: Frames, psa: Frames, path: Path) -> None:
    """PNG with frames from both videos and, eight times brighter, what differs."""
    chosen = np.linspace(0, len(dense) - 1, SHEET_COLUMNS).round().astype(int)
    apart = np.clip(np.abs(dense[chosen].astype(np.int16) - psa[chosen]) * 8, 0, 255).astype(np.uint8)
    rows = []
    for label, frames in (("dense", dense[chosen]), ("PSA", psa[chosen]), ("difference x 8", apart)):
        picture = np.hstack(list(frames))
        rows += [label_bar(label, picture.shape[1]), picture]
    Image.fromarray(np.vstack(rows)).save(path)


def print_table(results: dict[str, Any], out: Path) -> None:
    width = max(map(len, results))
    print()
    for name, value in results.items():
        print(f"  {name:<{width}}  {value}")
    if results["backend"] == "reference":
        print("\nOn the reference backend (a CPU) this shows the picture, not the speed.")
    print(f"\nSee {out / 'compare.webp'} and {out / 'contact_sheet.png'}.")


if __name__ == "__main__":
    main()

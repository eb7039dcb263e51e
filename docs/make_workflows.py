"""Write the workflows for image to video, for Wan 2.2's two experts, for CogVideoX, and the comparison.

    PYTHONPATH=demo python docs/make_workflows.py

Inputs and outputs of every node come from a running ComfyUI (COMFYUI_PATH); what follows here is only what differs
from its defaults. Thumbnails of all workflows show the demo's video, each with the name of its model.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from comfy_server import ComfyServer
from run import LABEL_HEIGHT

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
PACK_VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]

WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
UMT5 = f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
WAN_VAE = f"{WAN21}/vae/wan_2.1_vae.safetensors"
T5 = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors"
PSA_LORA = "https://huggingface.co/GYP666/BLADE/resolve/main/cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors"

FOX = (
    "A red fox trots along a snowy forest path at sunrise, its breath visible in the cold air, snow falling from the "
    "branches it brushes past. The camera follows at its side, low to the ground."
)
NEGATIVE = (
    "blurry, flickering, still image, distorted anatomy, extra limbs, oversaturated, text, watermark, low quality"
)
INTRODUCTION = (
    "**PSA Attention Patch** makes the model's self-attention sparse where that does not show. Nothing else changes: "
    "bypass the node (Ctrl+B) to compare. It shows what it did below its settings."
)
Output = tuple[int, int]

# What a thumbnail says: the model, and what the workflow does with it.
THUMBNAILS = {
    "psa_wan2.1_t2v_1.3b": ("Wan 2.1 1.3B", "text to video"),
    "psa_wan2.1_t2v_14b": ("Wan 2.1 14B", "text to video"),
    "psa_wan2.1_i2v_14b": ("Wan 2.1 14B", "image to video"),
    "psa_wan2.2_ti2v_5b": ("Wan 2.2 5B", "text to video"),
    "psa_wan2.2_a14b_t2v": ("Wan 2.2 A14B", "text to video"),
    "psa_wan2.2_a14b_t2v_4steps": ("Wan 2.2 A14B", "text to video, 4 steps"),
    "psa_wan2.2_a14b_i2v": ("Wan 2.2 A14B", "image to video"),
    "psa_wan2.2_a14b_i2v_4steps": ("Wan 2.2 A14B", "image to video, 4 steps"),
    "psa_cogvideox_5b": ("CogVideoX 5B", "text to video"),
    "psa_cogvideox_5b_4steps": ("CogVideoX 5B", "text to video, 4 steps"),
    "psa_cogvideox1.5_5b": ("CogVideoX 1.5 5B", "text to video"),
}
THUMBNAIL_SIDE = 256
COMPARISON = "psa_compare_wan2.1_1.3b", ("Wan 2.1 1.3B", "dense and PSA compared")


class Graph:
    """A workflow in the frontend's own format, built node by node.

    Args:
        info: ComfyUI's description of all nodes.
        core_version: First ComfyUI version that can run it.
    """

    def __init__(self, info: dict[str, Any], core_version: str) -> None:
        self._info, self._core_version = info, core_version
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.models: list[tuple[str, str, str]] = []

    def add(
        self,
        kind: str,
        pos: tuple[int, int],
        size: tuple[int, int],
        title: str = "",
        models: tuple[tuple[str, ...], ...] = (),
        **values: Any,
    ) -> Output:
        """Add a node; values are widget values, or ``(node, slot)`` to link; models are ``(url, directory)``,
        with the file's name behind them where it is not the url's."""
        described = self._info[kind]
        node: dict[str, Any] = {"id": len(self.nodes) + 1, "type": kind, "pos": list(pos), "size": list(size)}
        node |= {"flags": {}, "order": len(self.nodes), "mode": 0, "inputs": [], "outputs": []}
        specs = described["input"].get("required", {}) | described["input"].get("optional", {})
        assert values.keys() <= specs.keys(), f"{kind} has no {values.keys() - specs.keys()}"
        sockets, widgets, widget_values = [], [], []
        for name, spec in specs.items():
            options = spec[1] if len(spec) > 1 else {}
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            entry = {"localized_name": name, "name": name}
            if name in described["input"].get("optional", {}):
                entry["shape"] = 7
            entry["type"] = type_
            if type_ not in WIDGET_TYPES or options.get("forceInput"):
                sockets.append(entry)
                continue
            widgets.append(entry | {"widget": {"name": name}, "link": None})
            first = spec[0][:1] if isinstance(spec[0], list) else options.get("options", [])[:1]
            default = options.get("default", first[0] if first else "")
            linked = isinstance(values.get(name), tuple)
            widget_values.append(default if linked else values.get(name, default))
            if options.get("control_after_generate"):
                widget_values.append("fixed" if linked else "randomize")
            if options.get("image_upload"):
                widgets.append(upload(entry))
                widget_values.append("image")
        for entry in sockets:
            entry["link"] = (
                self._link(values[entry["name"]], node, len(node["inputs"])) if entry["name"] in values else None
            )
            node["inputs"].append(entry)
        for entry in widgets:
            if isinstance(values.get(entry["name"]), tuple):
                entry["link"] = self._link(values[entry["name"]], node, len(node["inputs"]))
            node["inputs"].append(entry)
        for type_, name in zip(described["output"], described["output_name"], strict=True):
            node["outputs"].append({"localized_name": name, "name": name, "type": type_, "links": None})
        if title:
            node["title"] = title
        own = kind.startswith("PSA")
        version = PACK_VERSION if own else self._core_version
        node["properties"] = {"cnr_id": "psa-attention" if own else "comfy-core", "ver": version}
        node["properties"]["Node name for S&R"] = kind
        if models:
            listed = [
                {"name": name[0] if name else url.rsplit("/", 1)[1], "url": url, "directory": folder}
                for url, folder, *name in models
            ]
            node["properties"]["models"] = listed
            self.models += [(entry["name"], entry["url"], entry["directory"]) for entry in listed]
        if widget_values:
            node["widgets_values"] = widget_values
        self.nodes.append(node)
        return node["id"], 0

    def note(self, text: str) -> None:
        node: dict[str, Any] = {"id": len(self.nodes) + 1, "type": "MarkdownNote", "pos": [-460, 60]}
        node |= {"size": [420, 440], "flags": {}, "order": len(self.nodes), "mode": 0, "inputs": [], "outputs": []}
        node |= {"title": "About this workflow", "properties": {}, "widgets_values": [text]}
        self.nodes.append(node | {"color": "#432", "bgcolor": "#653"})

    def _link(self, source: Output, target: dict[str, Any], slot: int) -> int:
        output = self.nodes[source[0] - 1]["outputs"][source[1]]
        self.links.append([len(self.links) + 1, *source, target["id"], slot, output["type"]])
        output["links"] = [*(output["links"] or []), len(self.links)]
        return len(self.links)

    def document(self, name: str) -> dict[str, Any]:
        """The workflow as the frontend loads it."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [520, 120]}},
            "version": 0.4,
        }

    def save(self, name: str) -> None:
        workflow = self.document(name)
        (WORKFLOWS / f"{name}.json").write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")


def upload(entry: dict[str, Any]) -> dict[str, Any]:
    """The button beside a file list, which the frontend keeps as an input of its own."""
    return {
        "localized_name": "upload",
        "name": "upload",
        "type": "IMAGEUPLOAD",
        "widget": {"name": "upload"},
        "link": None,
    }


def prompts(graph: Graph, encoder: str, kind: str, y: int) -> tuple[Output, Output]:
    name = encoder.rsplit("/", 1)[1]
    clip = graph.add("CLIPLoader", (0, y), (340, 106), models=((encoder, "text_encoders"),), clip_name=name, type=kind)
    positive = graph.add("CLIPTextEncode", (380, y), (300, 180), "Positive prompt", clip=clip, text=FOX)
    negative = graph.add("CLIPTextEncode", (380, y + 230), (300, 180), "Negative prompt", clip=clip, text=NEGATIVE)
    return positive, negative


def finish(graph: Graph, name: str, samples: Output, vae: Output, fps: int, title: str, numbers: str) -> None:
    images = graph.add("VAEDecode", (1460, 60), (220, 46), samples=samples, vae=vae)
    save_video(graph, name, images, fps, f"{title}, with PSA", numbers)


def save_video(graph: Graph, name: str, images: Output, fps: int, title: str, numbers: str) -> None:
    left, top = graph.nodes[images[0] - 1]["pos"]
    below = top + graph.nodes[images[0] - 1]["size"][1] + 54
    video = graph.add("CreateVideo", (left, below), (220, 78), images=images, fps=fps)
    graph.add("SaveVideo", (1720, 60), (480, 420), video=video, filename_prefix=f"video/{name}")
    models = "\n".join(f"- [{file}]({url}) → `models/{folder}`" for file, url, folder in graph.models)
    graph.note(
        f"## {title}\n\n{INTRODUCTION}\n\n**Models** (ComfyUI offers to download what is missing)\n\n{models}"
        f"\n\n**Where the numbers come from.** {numbers}\n"
    )
    graph.save(name)


def load_vae(graph: Graph, url: str, folder: str = "", pos: tuple[int, int] = (1100, 460)) -> Output:
    """The VAE; a folder of its own in models/vae tells files of one name apart."""
    name = folder + url.rsplit("/", 1)[1]
    return graph.add("VAELoader", pos, (320, 58), models=((url, "vae", name),), vae_name=name)


def wan21_i2v(info: dict[str, Any]) -> None:
    graph = Graph(info, "0.3.75")
    url = f"{WAN21}/diffusion_models/wan2.1_i2v_720p_14B_fp16.safetensors"
    model = graph.add(
        "UNETLoader", (0, 60), (340, 82), models=((url, "diffusion_models"),), unet_name=url.rsplit("/", 1)[1]
    )
    model = graph.add("ModelSamplingSD3", (380, 60), (300, 58), model=model, shift=5)
    model = graph.add("PSAAttentionPatch", (720, 60), (340, 340), model=model)
    positive, negative = prompts(graph, UMT5, "wan", 460)
    vae = load_vae(graph, WAN_VAE)
    image = graph.add("LoadImage", (0, 620), (340, 314), image="example.png")
    vision_url = f"{WAN21}/clip_vision/clip_vision_h.safetensors"
    vision = graph.add(
        "CLIPVisionLoader",
        (0, 980),
        (340, 58),
        models=((vision_url, "clip_vision"),),
        clip_name="clip_vision_h.safetensors",
    )
    seen = graph.add("CLIPVisionEncode", (380, 980), (300, 78), clip_vision=vision, image=image, crop="none")
    latent = graph.add(
        "WanImageToVideo", (720, 460), (340, 210), positive=positive, negative=negative, vae=vae,
        clip_vision_output=seen, start_image=image, width=1280, height=720, length=69,
    )  # fmt: skip
    samples = graph.add(
        "KSampler", (1100, 60), (320, 262), model=model, positive=latent, negative=(latent[0], 1),
        latent_image=(latent[0], 2), seed=0, steps=50, cfg=5, sampler_name="uni_pc", scheduler="simple",
    )  # fmt: skip
    numbers = (
        "1280 x 720, 69 frames at 16 per second, 50 steps, cfg 5 and shift 5 are the settings at which the official "
        "PSA code runs Wan 2.1."
    )
    finish(graph, "psa_wan2.1_i2v_14b", samples, vae, 16, "Wan 2.1 image to video, 14B", numbers)


def compare_wan21(info: dict[str, Any]) -> None:
    graph = Graph(info, "0.3.75")
    url = f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors"
    model = graph.add(
        "UNETLoader", (0, 60), (340, 82), models=((url, "diffusion_models"),), unet_name=url.rsplit("/", 1)[1]
    )
    seed = graph.add("PrimitiveInt", (0, 200), (340, 82), "Seed of both", value=0)
    graph.nodes[seed[0] - 1]["widgets_values"] = [0, "fixed"]
    dense = graph.add("ModelSamplingSD3", (380, 60), (300, 58), model=model, shift=5)
    patched = graph.add("PSAAttentionPatch", (720, 60), (340, 340), model=dense)
    positive, negative = prompts(graph, UMT5, "wan", 460)
    latent = graph.add("EmptyHunyuanLatentVideo", (720, 460), (340, 130), width=832, height=480, length=81)
    vae = load_vae(graph, WAN_VAE, (720, 650))
    videos = []
    for row, title, source in ((0, "Dense", dense), (1, "PSA", patched)):
        samples = graph.add(
            "KSampler", (1100, 60 + 340 * row), (320, 262), title, model=source, positive=positive, negative=negative,
            latent_image=latent, seed=seed, steps=50, cfg=5, sampler_name="uni_pc", scheduler="simple",
        )  # fmt: skip
        videos.append(
            graph.add("VAEDecode", (1460, 60 + 100 * row), (220, 46), f"{title} video", samples=samples, vae=vae)
        )
    images = graph.add("PSACompare", (1460, 260), (220, 200), dense=videos[0], psa=videos[1])
    numbers = (
        "Both samplers have the same seed, prompts and settings; one gets the model without PSA, the other with it. "
        "**PSA Compare** writes PSNR and SSIM on every frame, and those of the whole below. Change the preset of the "
        "patch and run again: the dense video comes from ComfyUI's cache as long as the seed is the same. 832 x 480, "
        "81 frames at 16 per second, 50 steps and cfg 5 are the defaults of Wan's own code for this model."
    )
    save_video(graph, COMPARISON[0], images, 16, "Dense and PSA side by side, Wan 2.1 1.3B", numbers)


def wan22_a14b(info: dict[str, Any], task: str, four_steps: bool) -> None:
    graph = Graph(info, "0.3.75")
    steps, split = (4, 2) if four_steps else (40, 26 if task == "t2v" else 15)
    shift = 5 if four_steps or task == "i2v" else 12
    preset = graph.add(
        "PSAPresetLoader", (380, -60), (300, 58), preset=f"wan2.2_a14b/{'four_steps' if four_steps else 'balanced'}"
    )
    patched = []
    for y, expert in ((60, "high"), (460, "low")):
        url = f"{WAN22}/diffusion_models/wan2.2_{task}_{expert}_noise_14B_fp8_scaled.safetensors"
        model = graph.add(
            "UNETLoader", (0, y), (340, 82), f"Expert for {expert} noise",
            models=((url, "diffusion_models"),), unet_name=url.rsplit("/", 1)[1],
        )  # fmt: skip
        if four_steps:
            version = "v1.1" if task == "t2v" else "v1"
            lora = f"{WAN22}/loras/wan2.2_{task}_lightx2v_4steps_lora_{version}_{expert}_noise.safetensors"
            model = graph.add(
                "LoraLoaderModelOnly", (0, y + 130), (340, 82),
                models=((lora, "loras"),), model=model, lora_name=lora.rsplit("/", 1)[1],
            )  # fmt: skip
        model = graph.add("ModelSamplingSD3", (380, y), (300, 58), model=model, shift=shift)
        patched.append(graph.add("PSAAttentionPatch", (720, y), (340, 340), model=model, custom_preset=preset))
    positive, negative = prompts(graph, UMT5, "wan", 860)
    vae = load_vae(graph, WAN_VAE)
    size = {"width": 1280, "height": 768, "length": 69}
    if task == "i2v":
        image = graph.add("LoadImage", (0, 1020), (340, 314), image="example.png")
        latent = graph.add(
            "WanImageToVideo", (720, 860), (340, 210), positive=positive, negative=negative, vae=vae, start_image=image,
            **size,
        )  # fmt: skip
        positive, negative, latent = latent, (latent[0], 1), (latent[0], 2)
    else:
        latent = graph.add("EmptyHunyuanLatentVideo", (720, 860), (340, 130), **size)
    common = {"positive": positive, "negative": negative, "steps": steps, "scheduler": "simple"}
    common["sampler_name"] = "euler" if four_steps else "uni_pc"
    samples = graph.add(
        "KSamplerAdvanced", (1100, 60), (320, 334), "High noise", model=patched[0], latent_image=latent, **common,
        add_noise="enable", noise_seed=0, cfg=1 if four_steps else 4, start_at_step=0, end_at_step=split,
        return_with_leftover_noise="enable",
    )  # fmt: skip
    samples = graph.add(
        "KSamplerAdvanced", (1100, 560), (320, 334), "Low noise", model=patched[1], latent_image=samples, **common,
        add_noise="disable", noise_seed=0, cfg=1 if four_steps else 3, start_at_step=split, end_at_step=10000,
        return_with_leftover_noise="disable",
    )  # fmt: skip
    official = "1280 x 768 and 69 frames are the size at which the official PSA code runs this model"
    rest = (
        "; 4 steps, two for each expert, cfg 1 and shift 5 are those of the LoRAs. The preset `four_steps` is sparse "
        "from the first step."
        if four_steps
        else f", as are 40 steps, cfg 4 for high and 3 for low noise. Shift {shift} and the change of experts after "
        f"step {split} (noise {0.875 if task == 't2v' else 0.9}) are those of Wan's own code."
    )
    name = f"psa_wan2.2_a14b_{task}{'_4steps' if four_steps else ''}"
    title = f"Wan 2.2 {'text' if task == 't2v' else 'image'} to video, A14B{', four steps' if four_steps else ''}"
    finish(graph, name, samples, vae, 16, title, official + rest)


def cogvideox(info: dict[str, Any], version: str, size: tuple[int, int, int], four_steps: bool = False) -> None:
    graph = Graph(info, "0.33.0")
    folder = f"cogvideo{version.lower()}"
    base = f"https://huggingface.co/zai-org/CogVideo{version}/resolve/main"
    index = f"{base}/transformer/diffusion_pytorch_model.safetensors.index.json"
    parts = 3 if "1.5" in version else 2
    shards = [
        f"{base}/transformer/diffusion_pytorch_model-{i:05}-of-{parts:05}.safetensors" for i in range(1, parts + 1)
    ]
    config = f"{base}/transformer/config.json"
    model = graph.add(
        "PSALoadCogVideoX", (0, 60), (340, 58),
        models=tuple((url, f"diffusion_models/{folder}") for url in (index, *shards, config)),
        model_name=f"{folder}/diffusion_pytorch_model.safetensors.index.json",
    )  # fmt: skip
    custom = {}
    if four_steps:
        model = graph.add(
            "PSALoadCogVideoXLoRA", (380, 60), (300, 82),
            models=((PSA_LORA, "loras"),), model=model, lora_name="pytorch_lora_weights.safetensors",
        )  # fmt: skip
        custom["custom_preset"] = graph.add("PSAPresetLoader", (380, 190), (300, 58), preset="cogvideox_5b/four_steps")
    model = graph.add("PSAAttentionPatch", (720, 60), (340, 340), model=model, **custom)
    positive, negative = prompts(graph, T5, "cogvideox", 460)
    width, height, length = size
    latent = graph.add("EmptyHunyuanLatentVideo", (720, 460), (340, 130), width=width, height=height, length=length)
    steps, cfg = (4, 1) if four_steps else (50, 6)
    samples = graph.add(
        "KSampler", (1100, 60), (320, 262), model=model, positive=positive, negative=negative, latent_image=latent,
        seed=0, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    vae = load_vae(graph, f"{base}/vae/diffusion_pytorch_model.safetensors", f"{folder}/")
    numbers = (
        f"{width} x {height}, {length} frames at 8 per second, {steps} steps and cfg {cfg} are the settings at which "
        "the official PSA code runs this model. It needs a ComfyUI with CogVideoX of its own (0.33 or newer)."
        "\n\n**Where the files go.** ComfyUI does not offer the files of the transformer: download them from the list "
        f"above and put them together into `models/diffusion_models/{folder}`. The VAE goes into "
        f"`models/vae/{folder}`."
    )
    name = f"psa_{folder.replace('-', '_')}_t2v".replace("_5b_t2v", "_5b_4steps" if four_steps else "_5b")
    title = f"CogVideo{version} text to video{', four steps' if four_steps else ''}"
    finish(graph, name, samples, vae, 8, title, numbers)


def draw_thumbnails() -> None:
    """Draw every workflow's thumbnail: a frame of the demo's video as PSA renders it, and the model's name."""
    with Image.open(ROOT / "docs/compare.webp") as video:
        side = video.height - LABEL_HEIGHT
        left = (3 * video.width // 2 - side) // 2  # PSA's picture is the right half
        for index, (name, words) in enumerate(THUMBNAILS.items()):
            video.seek(index * (video.n_frames - 1) // (len(THUMBNAILS) - 1))
            frame = video.convert("RGB")
            draw_thumbnail(name, *words, frame.crop((left, LABEL_HEIGHT, left + side, frame.height)))
        # The comparison shows the left half of the dense frame and the right half of PSA's.
        name, words = COMPARISON
        middle = left + side // 2
        both = frame.crop((left, LABEL_HEIGHT, left + side, frame.height))
        both.paste(frame.crop((left - frame.width // 2, LABEL_HEIGHT, middle - frame.width // 2, frame.height)))
        ImageDraw.Draw(both).line((side // 2, 0, side // 2, side), "white", 2)
        draw_thumbnail(name, *words, both)


def draw_thumbnail(name: str, model: str, task: str, picture: Image.Image) -> None:
    picture = picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS).convert("RGBA")
    shade = Image.new("RGBA", picture.size)
    ImageDraw.Draw(shade).rectangle((0, 186, THUMBNAIL_SIDE, THUMBNAIL_SIDE), fill=(0, 0, 0, 170))
    picture = Image.alpha_composite(picture, shade).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.text((14, 208), model, "white", ImageFont.load_default(size=26), anchor="lm")
    draw.text((14, 237), task, "#ddd", ImageFont.load_default(size=17), anchor="lm")
    picture.save(WORKFLOWS / f"{name}.jpg", quality=88)


def main() -> None:
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui")
    with ComfyServer(comfyui, cpu=True) as server:
        info = server.object_info()
    wan21_i2v(info)
    compare_wan21(info)
    for task in ("t2v", "i2v"):
        for four_steps in (False, True):
            wan22_a14b(info, task, four_steps)
    cogvideox(info, "X-5b", (720, 480, 49))
    cogvideox(info, "X1.5-5B", (1360, 768, 81))
    cogvideox(info, "X-5b", (720, 480, 49), four_steps=True)
    draw_thumbnails()


if __name__ == "__main__":
    main()

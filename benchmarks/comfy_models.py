"""Full-size video models of random weights in a real ComfyUI, made on the device without a file or a download."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACK = "psa_pack"
TEXT_WIDTH = 4096


@dataclass(frozen=True)
class VideoModel:
    """An architecture and the video that it renders.

    Args:
        network: Module and class in ComfyUI.
        settings: What the network is made of.
        latent: Shape ``[C, T, H, W]`` of the video's latent.
        patch: Latent elements of a token along T, H, W.
        text: Text tokens.
        joint_text: Text and video share one sequence.
        resolution: Pixels, for the record.
        frames: Frames, for the record.
    """

    network: tuple[str, str]
    settings: dict[str, Any] = field(hash=False)
    latent: tuple[int, int, int, int]
    text: int
    resolution: str
    frames: int
    patch: tuple[int, int, int] = (1, 2, 2)
    joint_text: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of the video along T, H, W."""
        t, h, w = (-(-size // patch) for size, patch in zip(self.latent[1:], self.patch, strict=True))
        return t, h, w

    @property
    def tokens(self) -> int:
        """Length of the sequence that self-attention sees."""
        t, h, w = self.grid
        return t * h * w + (self.text if self.joint_text else 0)


def _wan(
    dim: int, ffn: int, layers: int, latent: tuple[int, int, int, int], resolution: str, frames: int
) -> VideoModel:
    settings = {
        "model_type": "t2v",
        "dim": dim,
        "ffn_dim": ffn,
        "num_heads": dim // 128,
        "num_layers": layers,
        "in_dim": latent[0],
        "out_dim": latent[0],
    }
    return VideoModel(("comfy.ldm.wan.model", "WanModel"), settings, latent, 512, resolution, frames)


MODELS = {
    "wan2.1_14b": _wan(5120, 13824, 40, (16, 21, 90, 160), "1280x720", 81),
    "wan2.1_1.3b": _wan(1536, 8960, 30, (16, 21, 60, 104), "832x480", 81),
    "wan2.2_5b": _wan(3072, 14336, 30, (48, 31, 44, 80), "1280x704", 121),
    "cogvideox_5b": VideoModel(
        ("comfy.ldm.cogvideo.model", "CogVideoXTransformer3DModel"),
        {
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "num_layers": 42,
            "time_embed_dim": 512,
            "use_rotary_positional_embeddings": True,
        },
        (16, 13, 60, 90),
        226,
        "720x480",
        49,
        joint_text=True,
    ),
}


def shrink(model: VideoModel) -> VideoModel:
    """The same architecture so small that a CPU samples it in a moment."""
    small = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
    if model.joint_text:
        small = {"num_attention_heads": 3, "num_layers": 2, "time_embed_dim": 64}
    return replace(
        model,
        settings=model.settings | small,
        latent=(model.latent[0], 3, 16, 18),
        text=26,
        resolution="small",
        frames=9,
    )


def import_comfyui(path: Path, vram: str = "") -> str:
    """Make ComfyUI importable, without a GPU on the CPU, and return its version.

    Args:
        path: Its source folder.
        vram: ``lowvram`` or ``novram`` for ComfyUI's option of that name.

    Raises:
        ValueError: there is no ComfyUI.
    """
    if not (path / "comfy" / "sample.py").is_file():
        raise ValueError(f"COMFYUI_PATH: {str(path)!r} is not a ComfyUI source folder")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    arguments = importlib.import_module("comfy.cli_args").args
    if not torch.cuda.is_available():
        arguments.cpu = True
        arguments.use_pytorch_cross_attention = True
    if vram:
        setattr(arguments, vram, True)
    return str(importlib.import_module("comfyui_version").__version__)


def import_pack() -> Any:
    """The pack, as ComfyUI imports it."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK]


def load(model: VideoModel, dtype: torch.dtype) -> Any:
    """A ModelPatcher around the network with random weights, through ComfyUI's own detection and loading.

    Where ComfyUI spares the GPU's memory, the weights begin in main memory; else they are on the device at once.
    """
    import comfy.model_management
    import comfy.ops
    import comfy.sd

    module, name = model.network
    try:
        network_class = getattr(importlib.import_module(module), name)
    except ImportError:
        raise ValueError(f"this ComfyUI has no {module}") from None
    network = network_class(**model.settings, device="meta", dtype=dtype, operations=comfy.ops.disable_weight_init)
    management = comfy.model_management
    sparing = management.vram_state in (management.VRAMState.LOW_VRAM, management.VRAMState.NO_VRAM)
    device = torch.device("cpu") if sparing else management.get_torch_device()
    element = torch.zeros((), dtype=dtype, device=device)  # every weight is a view of it until it is filled
    weights = {name: element.expand(weight.shape) for name, weight in network.state_dict().items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, {"offload_device": device, "dtype": dtype})
    _fill(patcher.model.diffusion_model)
    return patcher


@torch.no_grad()
def _fill(network: torch.nn.Module) -> None:
    """Weights that keep activations in bounds."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


@torch.inference_mode()
def sample(patcher: Any, model: VideoModel, steps: int, callback: Callable[..., None]) -> None:
    """Sample with classifier-free guidance; the callback is the sampler's, called in every step."""
    import comfy.sample

    empty = torch.zeros(1, *model.latent)
    generator = torch.Generator().manual_seed(1)
    texts = [[[torch.randn(1, model.text, TEXT_WIDTH, generator=generator), {}]] for _ in range(2)]
    comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(empty, 2),
        steps,
        6.0,
        "euler",
        "simple",
        texts[0],
        texts[1],
        empty,
        callback=callback,
        disable_pbar=True,
        seed=2,
    )


def comfyui_path() -> Path | None:
    """The ComfyUI that the environment names."""
    path = os.environ.get("COMFYUI_PATH")
    return Path(path) if path else None

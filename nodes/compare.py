"""PSA Compare: two renderings of a video side by side, with PSNR and SSIM on the picture."""

from __future__ import annotations

import math

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .status import status_line
from .words import Words

SSIM_WINDOW = 7

_PEAK = 255.0
_STABILITY = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2


class PSACompare(io.ComfyNode):
    """Puts two videos beside each other and measures how far they are apart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACompare",
            display_name="PSA Compare",
            category="image",
            description=(
                "Puts two renderings of one video side by side, the same seed with and without PSA, and writes PSNR "
                "and SSIM on every frame."
            ),
            inputs=[
                io.Image.Input("dense", tooltip="The video without PSA."),
                io.Image.Input("psa", tooltip="The video with PSA: as many frames, of the same size."),
            ],
            outputs=[
                io.Image.Output(
                    "comparison", display_name="comparison", tooltip="Both videos side by side, with the figures."
                ),
                io.String.Output(
                    "figures",
                    display_name="figures",
                    tooltip="PSNR and SSIM of the whole video and of the frame that differs most.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dense: Tensor, psa: Tensor) -> io.NodeOutput:
        if dense.shape[:3] != psa.shape[:3]:
            sizes = [f"{frames} frames of {width}x{height}" for frames, height, width, _ in (dense.shape, psa.shape)]
            raise ValueError(f"psa: {sizes[1]} cannot be compared with {sizes[0]} of dense; length and size must agree")
        if min(dense.shape[1:3]) < SSIM_WINDOW:
            raise ValueError(
                f"dense: frames of {dense.shape[2]}x{dense.shape[1]} are smaller than SSIM's window, "
                f"{SSIM_WINDOW}x{SSIM_WINDOW}"
            )
        pairs = [(to_bytes(a), to_bytes(b)) for a, b in zip(dense[..., :3], psa[..., :3], strict=True)]
        differences = [squared_difference(a, b) for a, b in pairs]
        similarities = [ssim(a, b) for a, b in pairs]
        worst = int(np.argmax(differences))
        whole = _figures(float(np.mean(differences)), float(np.mean(similarities)))
        least = _figures(differences[worst], similarities[worst])
        frames, worst_frame = Words.of("frames", count=len(pairs)), Words.of("worst_frame", frame=worst + 1)
        text = f"{frames} {whole}; {worst_frame} {least}"
        status_line(cls.hidden.unique_id if cls.hidden else None)([frames, whole, worst_frame, least])
        return io.NodeOutput(_draw(pairs, differences, similarities, text), text)


def to_bytes(frame: Tensor) -> Tensor:
    """A frame as ComfyUI saves it: values of 0 to 1 become whole numbers of 0 to 255."""
    return (frame * _PEAK).clamp(0, _PEAK).to(torch.uint8)


def squared_difference(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of two frames of bytes."""
    return float((a.double() - b.double()).square().mean())


def psnr(difference: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared difference; infinite for the same picture."""
    return 10 * math.log10(_PEAK**2 / difference) if difference else math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two frames of bytes ``[height, width, channels]``.

    Means over windows of 7 x 7 that lie inside the frame, sample covariance, mean of the channels.

    Source: Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    a, b = a.movedim(-1, 0).double(), b.movedim(-1, 0).double()

    def mean(picture: Tensor) -> Tensor:
        return avg_pool2d(picture, SSIM_WINDOW, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    variances = sample * (mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2)
    c1, c2 = _STABILITY
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((alike / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).mean())


def _figures(difference: float, similarity: float) -> Words:
    if not difference:
        return Words.of("same_picture", ssim=similarity)
    return Words.of("figures", psnr=psnr(difference), ssim=similarity)


def _draw(pairs: list[tuple[Tensor, Tensor]], differences: list[float], similarities: list[float], text: str) -> Tensor:
    """Each pair side by side under its labels and above the figures of the whole ``[frames, H, W, 3]``, 0 to 1."""
    width = pairs[0][0].shape[1]
    bar = max(width // 16, 16)
    below = _bar(text, 2 * width, bar)
    pictures = []
    for (a, b), difference, similarity in zip(pairs, differences, similarities, strict=True):
        labels = _bar("dense", width, bar), _bar(f"PSA: {_figures(difference, similarity)}", width, bar)
        both = torch.cat((a, b), dim=1).float() / _PEAK
        pictures.append(torch.cat((torch.cat(labels, dim=1), both, below)))
    return torch.stack(pictures)


def _bar(text: str, width: int, height: int) -> Tensor:
    """White text in the middle of a black bar ``[height, width, 3]``, as large as fits."""
    bar = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(bar)
    size = 0.7 * height
    size *= min(0.95 * width / draw.textlength(text, ImageFont.load_default(size)), 1)
    draw.text((width / 2, height / 2), text, "white", ImageFont.load_default(max(int(size), 6)), anchor="mm")
    return torch.from_numpy(np.asarray(bar).copy()).float() / _PEAK

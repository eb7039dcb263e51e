"""Draw the pack's icon and banner: a pyramid of cells, each level twice as fine as the one above.

python docs/make_icon.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

WEB = Path(__file__).resolve().parents[1] / "web"
SCALE = 4  # drawn larger and reduced, for smooth edges
COLORS = ("#f6c945", "#f08a4b", "#d1495b", "#6d4c9f")
BACKGROUND, TEXT, FAINT = "#14161c", "#f2f2f2", "#a7abb8"


def main() -> None:
    icon = Image.new("RGB", (400 * SCALE, 400 * SCALE), BACKGROUND)
    draw_pyramid(ImageDraw.Draw(icon), centre=200, top=66)
    save(icon, "icon.png")

    banner = Image.new("RGB", (1050 * SCALE, 450 * SCALE), BACKGROUND)  # the registry's 21:9
    draw = ImageDraw.Draw(banner)
    draw_pyramid(draw, centre=225, top=91)
    draw.text((441 * SCALE, 148 * SCALE), "PSA Attention", TEXT, font("bold", 66))
    draw.text((444 * SCALE, 240 * SCALE), "Wan and CogVideoX videos, sooner,", FAINT, font("normal", 29))
    draw.text((444 * SCALE, 280 * SCALE), "with the picture you would have had", FAINT, font("normal", 29))
    save(banner, "banner.png")


def draw_pyramid(draw: ImageDraw.ImageDraw, centre: float, top: float) -> None:
    """Draw the pyramid, 330 wide and 269 high; a cell each for 1, 2, 4 and 8 groups of tokens."""
    width, height, row_gap, gap, radius = 330, 62, 7, 5, 7
    for level, color in enumerate(COLORS):
        cells = 2**level
        row_width = width * (level + 1) / len(COLORS)
        cell = (row_width - gap * (cells - 1)) / cells
        y = top + level * (height + row_gap)
        for index in range(cells):
            x = centre - row_width / 2 + index * (cell + gap)
            box = tuple(SCALE * edge for edge in (x, y, x + cell, y + height))
            draw.rounded_rectangle(box, radius=radius * SCALE, fill=color)


def font(weight: str, size: float) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(path, size * SCALE)


def save(picture: Image.Image, name: str) -> None:
    size = (picture.width // SCALE, picture.height // SCALE)
    picture.resize(size, Image.Resampling.LANCZOS).save(WEB / name, optimize=True)


if __name__ == "__main__":
    main()

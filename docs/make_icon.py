"""Draw the pack's icon: a pyramid of cells, each level half as fine as the one below.

python docs/make_icon.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
SIZE = 400
SCALE = 4  # drawn larger and reduced, for smooth edges
COLORS = ("#f6c945", "#f08a4b", "#d1495b", "#6d4c9f")
BACKGROUND = "#14161c"


def main() -> None:
    picture = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    width, height, top = 330 * SCALE, 62 * SCALE, 66 * SCALE
    for level, color in enumerate(COLORS):
        cells = 2**level
        row_width = width * (level + 1) / len(COLORS)
        left = (SIZE * SCALE - row_width) / 2
        y = top + level * (height + 7 * SCALE)
        gap = 5 * SCALE
        cell = (row_width - gap * (cells - 1)) / cells
        for index in range(cells):
            x = left + index * (cell + gap)
            draw.rounded_rectangle((x, y, x + cell, y + height), radius=7 * SCALE, fill=color)
    picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(ROOT / "web" / "icon.png", optimize=True)


if __name__ == "__main__":
    main()

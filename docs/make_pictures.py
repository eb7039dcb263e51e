"""Make the README's pictures and figures from what `make demo` has written.

    make pictures

Writes compare.webp, contact_sheet.webp and demo_results.json beside this file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image, ImageSequence

from run import label_bar

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "demo/out"


def main() -> None:
    results = json.loads((OUT / "results.json").read_text())
    shutil.copy(OUT / "results.json", HERE / "demo_results.json")
    with Image.open(OUT / "compare.webp") as video:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(video)]
        duration = video.info["duration"]  # known once a frame has been read
    if results["backend"] == "reference":  # a CPU shows the picture, not the speed
        frames = [without_times(frame) for frame in frames]
    frames[0].save(
        HERE / "compare.webp", save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=60, method=6
    )
    with Image.open(OUT / "contact_sheet.png") as sheet:
        smaller = sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3), Image.Resampling.LANCZOS)
        smaller.save(HERE / "contact_sheet.webp", quality=80, method=6)
    print(f"{results['psnr_db']} dB on ComfyUI {results['comfyui_version']}, backend {results['backend']}")


def without_times(pair: Image.Image) -> Image.Image:
    """A side-by-side picture whose labels say no more than which is which."""
    relabelled, width = pair.copy(), pair.width // 2
    for column, label in enumerate(("dense", "PSA")):
        relabelled.paste(Image.fromarray(label_bar(label, width)), (column * width, 0))
    return relabelled


if __name__ == "__main__":
    main()

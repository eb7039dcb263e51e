"""The texts of the nodes, as ComfyUI's translations hold them.

python tests/node_texts.py    (make locales)

writes locales/en/nodeDefs.json from the nodes themselves; the other languages are written by hand.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from comfy_server import PACK_NAME, ComfyServer

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"


def main() -> None:
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui")
    with ComfyServer(comfyui, cpu=True) as server:
        info = server.object_info()
    texts = {name: texts_of(node) for name, node in info.items() if node["python_module"].endswith(f".{PACK_NAME}")}
    write("en", dict(sorted(texts.items())))


def escaped(text: str) -> str:
    """A text as vue-i18n wants it, to which braces, @, $ and | are commands."""
    return re.sub(r"[{}@$|]", lambda match: f"{{'{match[0]}'}}", text)


def texts_of(node: dict[str, Any]) -> dict[str, Any]:
    """Texts of a node by their keys in nodeDefs.json, from its entry in /object_info."""
    entries = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": escaped(node["display_name"]),
        "description": escaped(node["description"]),
        "inputs": {name: {"name": name, "tooltip": escaped(spec[1]["tooltip"])} for name, spec in entries.items()},
        "outputs": {str(index): {"name": name, "tooltip": escaped(tip)} for index, (name, tip) in enumerate(outputs)},
    }


def read(language: str) -> dict[str, Any]:
    texts: dict[str, Any] = json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))
    return texts


def write(language: str, texts: dict[str, Any]) -> None:
    path = LOCALES / language / "nodeDefs.json"
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

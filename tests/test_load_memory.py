"""How much memory Load CogVideoX (diffusers) takes: the model's own, and no second copy of its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny_cogvideox import TIME, network_class

MODEL = "diffusion_pytorch_model"
TESTS = Path(__file__).resolve().parent
# Memory that belongs to the process alone; the file's pages are the page cache's.
SCRIPT = """
import sys, threading
from pathlib import Path
sys.path[:0] = [{tests!r}, {comfyui!r}]
import comfy.cli_args
comfy.cli_args.args.cpu = True
from pack import load_pack
load_pack()
from psa_pack.nodes.load_cogvideox import load_cogvideox

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

load_cogvideox({small!r})  # what the first load of any model leaves behind
done, before, peak = threading.Event(), anonymous(), 0
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        done.wait(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_cogvideox({large!r})
done.set()
watcher.join()
print(model.model_size(), max(peak, anonymous()) - before)
"""


def save(folder: Path, blocks: int) -> Path:
    """Write a transformer in two parts, as diffusers does; what its weights are does not matter here."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=18, num_layers=blocks, time_embed_dim=TIME, use_rotary_positional_embeddings=True
        )
    weights = {name: torch.full(weight.shape, 0.01) for name, weight in model.state_dict().items()}
    folder.mkdir()
    places = {name: f"{MODEL}-{1 + index % 2:05}-of-00002.safetensors" for index, name in enumerate(weights)}
    for part in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == part}, folder / part)
    index = folder / f"{MODEL}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own memory from the page cache")
def test_no_weight_is_twice_in_memory(comfyui: Path, tmp_path: Path) -> None:
    network_class()
    small, large = (str(save(tmp_path / str(blocks), blocks)) for blocks in (2, 8))
    script = SCRIPT.format(tests=str(TESTS), comfyui=str(comfyui), small=small, large=large)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    weights, taken = map(int, done.stdout.split()[-2:])
    assert weights > 300e6
    assert taken < 1.1 * weights

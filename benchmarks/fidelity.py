"""Error against density of the choices a preset makes, on attention captured from the demo's model.

    python benchmarks/fidelity.py                      (a CPU will do, minutes; a GPU is quicker)
    python benchmarks/fidelity.py --grid 21 30 52      another video than the model's own 13 x 16 x 24 tokens

At every noise level each choice is set to the same density, so that errors can be compared. Writes
``fidelity-<tokens>-<device>.json``:
``{device, versions, commit, grid, heads, records}`` with records of
``{noise, choice, error_weight, density, rel_l2, worst_head, first_frame, milliseconds}``: ``first_frame`` is the error
of the first latent frame alone, ``milliseconds`` the median time of the whole call (on a GPU, else null).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.learned import capture  # noqa: E402
from benchmarks.measure import timed  # noqa: E402
from benchmarks.results_file import RESULTS, checked_out_commit, describe_machine  # noqa: E402
from psa_core import PSAConfig, TokenLayout, plan_order, psa_attention  # noqa: E402
from psa_core.bench import config_of_density  # noqa: E402

NOISES = (0.9, 0.6, 0.3)
BASE = PSAConfig(error_weight=0.01)
SORTED = replace(BASE, group_keys=True)
FIRST_FRAME_EXACT = "first latent frame exact"
CHOICES: dict[str, PSAConfig] = {
    "default": BASE,
    "order tile 4x4x4": replace(BASE, order="tile"),
    "order raster": replace(BASE, order="raster"),
    "query blocks of 64": replace(BASE, query_block=64),
    "key blocks of 32": replace(BASE, key_block=32),
    "key blocks of 128": replace(BASE, key_block=128),
    "importance from every row": replace(BASE, importance_stride=1),
    "keys in order of content": SORTED,
    **{
        f"the same, importance from means of {group}, every {stride}th row": replace(
            SORTED, importance_group=group, importance_stride=stride
        )
        for group, stride in ((64, 16), (32, 8), (32, 4), (16, 16), (16, 8), (16, 4), (8, 8))
    },
    "the same, key blocks of 128": replace(SORTED, key_block=128),
    "the same, key blocks of 32": replace(SORTED, key_block=32),
    "without the second-order term": replace(BASE, variance_term=False),
    "levels 1 and block": replace(BASE, levels=(1, "block")),
    FIRST_FRAME_EXACT: BASE,
}
TOPK = PSAConfig(
    selection="topk",
    levels=(1, 2, 8, "skip"),
    ranges=((0, 0.1), (0.1, 0.15), (0.15, 0.35), (0.35, 1)),
    variance_term=False,
)
WEIGHTS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    grid = tuple(args.grid)
    records = []
    for noise, (q, k, v) in capture(grid, NOISES, seed=args.seed, device=device, dtype=dtype).items():
        exact = torch.cat(
            [scaled_dot_product_attention(*(x[:, h : h + 1].float() for x in (q, k, v))) for h in range(q.shape[1])],
            dim=1,
        )
        first_frame = slice(0, grid[1] * grid[2])
        for name, config in list_choices(grid, q, k, v, args.density).items():
            out, density = attend(layout_for(name, grid), config, q, k, v)
            difference = out.float() - exact
            apart = difference.norm(dim=(2, 3))
            record = {
                "noise": noise,
                "choice": name,
                "error_weight": config.error_weight,
                "density": density,
                "rel_l2": float(apart.norm() / exact.norm()),
                "worst_head": float((apart / exact.norm(dim=(2, 3))).max()),
                "first_frame": float(difference[:, :, first_frame].norm() / exact[:, :, first_frame].norm()),
                "milliseconds": milliseconds(layout_for(name, grid), config, q, k, v),
            }
            del out, difference
            records.append(record)
            print(f"noise {noise}  {name:<30} density {density:.3f}  error {record['rel_l2']:.4f}", flush=True)
    machine = describe_machine(args.commit) | {"grid": grid, "heads": q.shape[1], "records": records}
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"fidelity-{q.shape[2]}-{machine['device'].lower().replace(' ', '-')}.json"
    (args.out / name).write_text(json.dumps(machine, indent=1) + "\n")


def layout_for(choice: str, grid: tuple[int, int, int]) -> TokenLayout:
    """The video's tokens, all of them free or those of the first latent frame exact."""
    return TokenLayout(grid, exact_spans=((0, grid[1] * grid[2]),) if choice == FIRST_FRAME_EXACT else ())


def list_choices(grid: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor, density: float) -> dict[str, PSAConfig]:
    """Every choice at the common density, the official kind of top-k, and the default at fixed error weights."""
    choices = {}
    for name, config in CHOICES.items():
        found = config_of_density(
            lambda weighted, name=name, config=config: attend(
                layout_for(name, grid), replace(config, error_weight=weighted.error_weight), q, k, v
            )[1],
            density,
        )
        choices[name] = replace(config, error_weight=found.error_weight)
    choices["top-k 1 2 8 skip"] = TOPK
    return choices | {f"error_weight {weight:g}": replace(BASE, error_weight=weight) for weight in WEIGHTS}


def milliseconds(layout: TokenLayout, config: PSAConfig, q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Median time of the whole call, as the nodes make it."""
    if q.device.type != "cuda":
        return None
    order = plan_order(layout, config, q.device)
    return timed(partial(psa_attention, q, k, v, layout=layout, config=config, order=order, stats=True), 5)[1]


def attend(layout: TokenLayout, config: PSAConfig, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Output and mean density."""
    order = plan_order(layout, config, q.device)
    result = psa_attention(q, k, v, layout=layout, config=config, order=order, stats=True)
    assert isinstance(result, tuple)
    return result[0], float(result[1].density.mean())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(13, 16, 24), metavar=("T", "H", "W"), help="tokens")
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

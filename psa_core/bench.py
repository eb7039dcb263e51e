"""What PSA brings on this GPU: ``python -m psa_core.bench``.

Times attention alone, dense and sparse, for videos of growing length, and says from how many tokens on sparse pays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import PSAStats, plan_order, psa_attention
from .capability import HEAD_DIMS, reason_against
from .config import PSAConfig
from .layout import TokenLayout
from .ordering import TokenOrder
from .synthetic import structured

HEIGHT, WIDTH = 30, 52  # tokens of a 480 x 832 Wan frame
LENGTHS = (3, 5, 8, 13, 21, 31)  # latent frames
REPEATS = 7
DENSITY_TOLERANCE = 0.005


@dataclass(frozen=True)
class Timing:
    """One video length.

    Args:
        tokens: Tokens of the video.
        dense_ms: Median time of PyTorch's own attention.
        sparse_ms: Median time of PSA.
        density: Share of the dense work that PSA did.
    """

    tokens: int
    dense_ms: float
    sparse_ms: float
    density: float


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its table; returns the process's exit status."""
    args = _parse(arguments)
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        print("There is no CUDA device to measure on.", file=sys.stderr)
        return 1
    if reason := reason_against("triton", device, args.dtype, args.head_dim):
        print(reason, file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, {args.heads} heads of {args.head_dim}, {args.dtype}, batch 1")
    print(f"{'tokens':>8} {'dense ms':>10} {'PSA ms':>10} {'density':>8} {'faster':>8}")
    timings = []
    for frames in args.frames:
        timing = measure((frames, *args.frame), args.heads, args.head_dim, args.dtype, args.density)
        timings.append(timing)
        faster = f"{timing.dense_ms / timing.sparse_ms:.2f}x"
        print(
            f"{timing.tokens:>8} {timing.dense_ms:>10.3f} {timing.sparse_ms:>10.3f} {timing.density:>8.3f} {faster:>8}"
        )
    print(describe_crossover(timings))
    return 0


def measure(grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype, density: float) -> Timing:
    """Time one video of ``grid`` tokens, dense and with PSA at about the given density."""
    video = Video.structured(grid, heads, head_dim, dtype)
    return video.time(config_of_density(video.density_of, density), video.dense_ms())


@dataclass(frozen=True)
class Video:
    """Self-attention of one synthetic video on the GPU.

    Args:
        order: Its tokens, as most configs order them.
        q: Queries ``[1, H, N, D]``; k and v likewise.
    """

    order: TokenOrder
    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def structured(grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype) -> Video:
        """Make one of a seed."""
        order = plan_order(TokenLayout(grid), PSAConfig(error_weight=0.0), "cuda")
        return Video(order, *structured(grid, heads, head_dim, seed=0, device="cuda", dtype=dtype))

    def dense_ms(self) -> float:
        """Median time of PyTorch's own attention."""
        return _median_ms(lambda: scaled_dot_product_attention(self.q, self.k, self.v))

    def density_of(self, config: PSAConfig) -> float:
        """Mean density of all heads."""
        return float(self._attend(config, self._order_for(config))[1].density.mean())

    def time(self, config: PSAConfig, dense_ms: float) -> Timing:
        """Time PSA, called as the patch node calls it, beside a dense time."""
        order = self._order_for(config)
        return Timing(
            tokens=self.order.layout.tokens,
            dense_ms=dense_ms,
            sparse_ms=_median_ms(lambda: self._attend(config, order)),
            density=self.density_of(config),
        )

    def _order_for(self, config: PSAConfig) -> TokenOrder:
        layout, device = self.order.layout, self.q.device
        return self.order if self.order.fits(layout, config, device) else plan_order(layout, config, device)

    def _attend(self, config: PSAConfig, order: TokenOrder) -> tuple[Tensor, PSAStats]:
        result = psa_attention(
            self.q, self.k, self.v, layout=order.layout, config=config, order=order, backend="triton", stats=True
        )
        assert isinstance(result, tuple)
        return result


def config_of_density(
    density_of: Callable[[PSAConfig], float], wanted: float, config: PSAConfig | None = None
) -> PSAConfig:
    """A config, the default one if none is given, with the error weight that gives a density.

    Found by bisection of the weight's logarithm.
    """
    low, high = -10.0, 2.0  # powers of ten
    config = config or PSAConfig(error_weight=0.0)
    for _ in range(14):
        middle = (low + high) / 2
        config = replace(config, error_weight=10.0**middle)
        density = density_of(config)
        if abs(density - wanted) < DENSITY_TOLERANCE:
            break
        low, high = (middle, high) if density > wanted else (low, middle)
    return config


def crossover(timings: list[Timing]) -> int | None:
    """From about how many tokens on sparse pays, in hundreds, between the lengths that were measured.

    Returns:
        The first length if it pays at all of them, None if it does not at the last.
    """
    wins = [timing.sparse_ms < timing.dense_ms for timing in timings]
    if all(wins):
        return timings[0].tokens
    if not wins[-1]:
        return None
    last_loss = max(index for index, won in enumerate(wins) if not won)
    before, after = timings[last_loss], timings[last_loss + 1]
    lost, gained = before.sparse_ms / before.dense_ms - 1, 1 - after.sparse_ms / after.dense_ms
    return 100 * round((before.tokens + (after.tokens - before.tokens) * lost / (lost + gained)) / 100)


def describe_crossover(timings: list[Timing]) -> str:
    """The same as a sentence."""
    tokens = crossover(timings)
    if tokens is None:
        return f"PSA is not faster at {timings[-1].tokens} tokens and below."
    if all(timing.sparse_ms < timing.dense_ms for timing in timings):
        return f"PSA is faster at every length measured, from {tokens} tokens on."
    return f"PSA pays from about {tokens:.0f} tokens on; as min_tokens, set {tokens:.0f}."


def _median_ms(run: Callable[[], object]) -> float:
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:  # as in a model, the CPU launches one run while the GPU is still busy with another
        run()
        mark.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairwise(marks)]
    return sorted(times)[REPEATS // 2]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m psa_core.bench", description=__doc__)
    parser.add_argument("--heads", type=_positive, default=12, help="attention heads (Wan 1.3B 12, 5B 24, 14B 40)")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128, help="64 for CogVideoX")
    parser.add_argument("--dtype", type=_dtype, default=torch.bfloat16, help="bf16, fp16 or fp32")
    parser.add_argument("--density", type=_share, default=0.15, help="share of the dense work to do")
    parser.add_argument(
        "--frame", type=_positive, nargs=2, default=(HEIGHT, WIDTH), metavar=("ROWS", "COLUMNS"),
        help="tokens of a frame: a Wan token is 16 x 16 pixels",
    )  # fmt: skip
    parser.add_argument(
        "--frames",
        type=_positive,
        nargs="+",
        default=LENGTHS,
        help="lengths to time, in latent frames (4 of the video)",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def _dtype(text: str) -> torch.dtype:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if text not in dtypes:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(dtypes)}")
    return dtypes[text]


if __name__ == "__main__":
    sys.exit(main())

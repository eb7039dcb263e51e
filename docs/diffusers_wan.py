"""Wan in diffusers with pyramid sparse attention: psa_core without ComfyUI.

    pip install torch '.[triton]' 'diffusers>=0.42' transformers accelerate av ftfy
    python docs/diffusers_wan.py "A red fox runs through deep snow."

Takes any text to video Wan that diffusers loads, Wan 2.2 with its two experts included. The first sparse step takes
longer: Triton compiles its kernels once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel
from diffusers.utils import encode_video
from torch import Tensor

from psa_core import PSAConfig, TokenLayout, TokenOrder, plan_order, psa_attention
from psa_core.models.wan import detect_family
from psa_core.presets import Preset, load_presets

PRESETS = Path(__file__).resolve().parent.parent / "presets"


class SparseRun:
    """What the attention of one transformer knows of the sampling step that it is in.

    Args:
        pipe: The pipeline, whose scheduler says how far the sampling is.
        preset: What sparse calls do, and in which part of the sampling.
    """

    def __init__(self, pipe: WanPipeline, preset: Preset) -> None:
        self.pipe, self.preset = pipe, preset
        self.sparse, self.done, self.layout = False, 0.0, TokenLayout((1, 1, 1))
        self.orders: dict[TokenLayout, TokenOrder] = {}
        self.densities: list[Tensor] = []

    def before_step(
        self, transformer: WanTransformer3DModel, args: tuple[object, ...], kwargs: dict[str, Tensor]
    ) -> None:
        """Read where the video is among the tokens, and whether this step is sparse."""
        extent = kwargs["hidden_states"].shape[2:]  # latent frames, rows, columns
        frames, rows, columns = (n // p for n, p in zip(extent, transformer.config.patch_size, strict=True))
        self.layout = TokenLayout((frames, rows, columns))
        self.done = (self.pipe.scheduler.timesteps > kwargs["timestep"].max()).float().mean().item()
        schedule = self.preset.schedule
        in_window = schedule.start_percent <= self.done < schedule.end_percent
        self.sparse = in_window and self.layout.tokens >= schedule.min_tokens

    def config(self, block: int, blocks: int) -> PSAConfig:
        """The preset's settings with the error weight of this step, in one of so many blocks."""
        config = self.preset.config
        if config.error_weight is None:
            return config
        factor = self.preset.schedule.weight_at(self.done, block, (("blocks", blocks),))
        return replace(config, error_weight=config.error_weight * factor)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, config: PSAConfig) -> Tensor:
        """Attention of ``[B, N, H, D]`` queries, keys and values."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        order = self.orders.get(self.layout)
        if order is None:
            order = self.orders[self.layout] = plan_order(self.layout, config, q.device)
        out, stats = psa_attention(q, k, v, layout=self.layout, config=config, order=order, stats=True)
        self.densities.append(stats.density.mean())
        return out.transpose(1, 2)


class SparseSelfAttention:
    """Attention processor of one block: the block's own where the run is dense, PSA where it is sparse."""

    def __init__(self, run: SparseRun, dense: object, block: int, blocks: int) -> None:
        self.run, self.dense, self.block, self.blocks = run, dense, block, blocks

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not self.run.sparse:
            return self.dense(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        q, k = (rotate(x, *rotary_emb) for x in (q, k))
        out = self.run.attend(q, k, v, self.run.config(self.block, self.blocks)).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its token's angle: rotary position embedding of ``[B, N, H, D]``."""
    turn = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def use_psa(pipe: WanPipeline, preset: Preset) -> list[SparseRun]:
    """Make the self-attention of a pipeline's transformers sparse, where and as the preset says."""
    runs = []
    for transformer in filter(None, (pipe.transformer, pipe.transformer_2)):
        run = SparseRun(pipe, preset)
        transformer.register_forward_pre_hook(run.before_step, with_kwargs=True)
        blocks = len(transformer.blocks)
        dense_blocks = preset.schedule.dense_blocks.resolve(blocks)
        for index, block in enumerate(transformer.blocks):
            if index not in dense_blocks:
                block.attn1.set_processor(SparseSelfAttention(run, block.attn1.processor, index, blocks))
        runs.append(run)
    return runs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument(
        "--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="a folder, or a name on Hugging Face"
    )
    parser.add_argument("--presets", type=Path, help="preset file; by default the bundled one of the model's size")
    parser.add_argument("--preset", default="balanced", help="name in the preset file, or off")
    parser.add_argument("--size", type=int, nargs=3, default=(832, 480, 81), metavar=("WIDTH", "HEIGHT", "FRAMES"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="wan.mp4")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"vae": torch.float32, "default": torch.bfloat16}
    pipe = WanPipeline.from_pretrained(args.model, dtype=dtypes).to(device)
    runs = []
    if args.preset != "off":
        size = pipe.transformer.config
        dim = size.num_attention_heads * size.attention_head_dim
        family = detect_family(dim, size.num_layers, size.out_channels).family
        presets = load_presets(args.presets or PRESETS / f"{family.preset_family}.yaml")
        if args.preset not in presets:
            parser.error(f"--preset: {args.preset!r} is not one of off, {', '.join(presets)}")
        runs = use_psa(pipe, presets[args.preset])
    width, height, frames = args.size
    video = pipe(
        args.prompt,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    encode_video(video, fps=16, output_path=args.out)
    densities = [density for run in runs for density in run.densities]
    mean = f", mean density {torch.stack(densities).mean():.3f}" if densities else ""
    print(f"{args.out}: {len(densities)} sparse attention calls{mean}")


if __name__ == "__main__":
    main()

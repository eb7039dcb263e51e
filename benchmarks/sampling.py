"""Seconds per sampling step of whole models in a real ComfyUI, dense and with the PSA Attention Patch.

    COMFYUI_PATH=... python benchmarks/sampling.py                      every model (many minutes)
    COMFYUI_PATH=... python benchmarks/sampling.py --models wan2.1_14b --runs dense,balanced,density

ComfyUI's own loading, model and sampler code, euler with guidance (the prompt and the negative one in a batch where
ComfyUI finds the memory for it), in process. Architectures are full-size, their **weights random**: nothing is
downloaded, and time and memory of a step do not depend on what the picture is. How sparse a preset runs does: at random
weights its density is not a real model's. So there are also runs at fixed densities, with the ``error_weight`` that
gives them on the model's own queries, keys and values; read the presets' speed off those.

``dense`` is ComfyUI's choice of attention (it prefers PyTorch's FlashAttention), ``dense cudnn`` the fastest in PyTorch
on Hopper. All steps of a PSA run are sparse: a preset's ``start_percent`` is set aside, its other settings hold.

Writes ``sampling-<device>.json``: ``{device, versions, commit, records: [{model, weights, resolution, frames, tokens,
vram, method, preset, error_weight, density, seconds_per_step, attention_share, attention_calls_per_step,
peak_vram_mib}]}``; the file is saved after every run and gone on with by a later one of the same device, versions and
commit. With ``--vram lowvram`` or ``novram`` the weights begin in main memory: with ``novram`` ComfyUI fetches all of
them in every step, with ``lowvram`` those that do not fit.
``attention_share`` is self-attention's part of the step; as many calls as blocks mean that ComfyUI ran the prompt and
the negative one in a batch.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import comfy_models  # noqa: E402
from benchmarks.comfy_models import MODELS, VideoModel  # noqa: E402
from benchmarks.results_file import (  # noqa: E402
    RESULTS,
    Record,
    ResultFile,
    checked_out_commit,
    describe_machine,
    device_slug,
    installed,
)

DENSE = ("dense", "dense cudnn")
PRESETS = ("balanced", "quality", "fast")
RUNS = (*DENSE, *PRESETS, "density")
DENSITIES = (0.15, 0.3)
VRAM = ("normal", "lowvram", "novram")
PROBED_BLOCKS = 6
KEY = ("vram", "model", "method", "preset")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    comfyui = comfy_models.import_comfyui(args.comfyui, "" if args.vram == "normal" else args.vram)
    comfy_models.import_pack()
    machine = describe_machine(args.commit)
    machine["versions"] |= {"comfyui": comfyui, "comfy_kitchen": installed("comfy_kitchen")}
    name = f"sampling-{'tiny-' if args.tiny else ''}{device_slug()}.json"
    results = ResultFile.open(args.out / name, machine, KEY)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    for name in args.models:
        model = comfy_models.shrink(MODELS[name]) if args.tiny else MODELS[name]
        common = {
            "model": name,
            "weights": "random",
            "resolution": model.resolution,
            "frames": model.frames,
            "tokens": model.tokens,
            "vram": args.vram,
        }
        try:
            patcher = comfy_models.load(model, dtype)
        except (ValueError, torch.OutOfMemoryError) as error:
            results.add(common | {"method": "", "preset": "", "failed": str(error)})
            print(f"{name}: {error}", flush=True)
            continue
        for record in measure_model(patcher, model, args):
            results.add(common | record)
            print_record(common | record)
        del patcher
        release_memory()
    print(f"wrote {results.path}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            parts = text.split(",")
            if unknown := [part for part in parts if part not in allowed]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
            return [name for name in allowed if name in parts]

        return parse

    def densities(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = [0.0]
        if not all(0 < value < 1 for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} is not numbers between 0 and 1, comma between")
        return values

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=comfy_models.comfyui_path(), help="default: COMFYUI_PATH")
    parser.add_argument("--models", type=names(tuple(MODELS)), default=list(MODELS), help="names, comma between")
    parser.add_argument("--runs", type=names(RUNS), default=list(RUNS), help="likewise")
    parser.add_argument("--densities", type=densities, default=list(DENSITIES), help="of the runs at fixed density")
    parser.add_argument("--steps", type=int, default=3, help="of every run; the first one is not timed")
    parser.add_argument("--vram", choices=VRAM, default="normal", help="ComfyUI's option of that name")
    parser.add_argument("--tiny", action="store_true", help="models of two small blocks, to try the program itself")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.comfyui is None:
        parser.error("COMFYUI_PATH or --comfyui must name a ComfyUI source folder")
    if args.steps < 2:
        parser.error(f"argument --steps: {args.steps} is less than 2, of which the first is not timed")
    if not torch.cuda.is_available():
        if not args.tiny:
            parser.error("there is no CUDA device to measure on; --tiny only tries the program")
        if args.vram != "normal":
            parser.error("argument --vram: without a CUDA device there is no memory to spare")
    return args


def measure_model(patcher: Any, model: VideoModel, args: argparse.Namespace) -> Iterator[Record]:
    """Records of the wanted runs of one model."""
    for name in args.runs:
        if name in DENSE:
            yield attempt({"method": name, "preset": ""}, lambda: measure_dense(patcher, model, name, args.steps))  # noqa: B023
        elif name in PRESETS:
            record = {"method": "psa", "preset": name}
            yield attempt(record, lambda: measure_psa(patcher, model, args, preset=name))  # noqa: B023
    if "density" in args.runs:
        yield from measure_densities(patcher, model, args)


def measure_densities(patcher: Any, model: VideoModel, args: argparse.Namespace) -> Iterator[Record]:
    """Runs of the balanced preset at other error weights, found on the model's own queries, keys and values."""
    nodes = pack("nodes.attention_patch")
    family = nodes.identify(patcher.get_model_object("diffusion_model")).preset_family
    config = nodes.load_preset(f"{family}/balanced").config
    probe = KeptInputs(model, args.steps // 2)
    probed = patch_model(patcher, args, "balanced")
    probe.attach(probed)
    comfy_models.sample(probed, model, args.steps, lambda *_: None)
    weights = {density: probe.error_weight(config, density) for density in args.densities}
    del probe, probed
    release_memory()
    for density, weight in weights.items():
        record = {"method": "psa", "preset": f"density {density:g}"}
        yield attempt(record, lambda: measure_psa(patcher, model, args, error_weight=weight))  # noqa: B023


def attempt(record: Record, measure: Callable[[], Record]) -> Record:
    """The record of a run, or why there is none."""
    try:
        return record | measure()
    except RuntimeError as error:  # out of memory, no such kernel, or a run that fell back to dense
        release_memory()
        return record | {"failed": str(error).partition("\n")[0]}


class RunFailed(RuntimeError):
    """A run was not what its record would say."""


def measure_dense(patcher: Any, model: VideoModel, method: str, steps: int) -> Record:
    """One run with ComfyUI's own attention, or with cuDNN's in its place."""
    clock = AttentionClock(model.tokens, SDPBackend.CUDNN_ATTENTION if method == "dense cudnn" else None)
    return sample_timed(patcher.clone(), model, clock, steps) | {"error_weight": None, "density": 1.0}


def measure_psa(
    patcher: Any, model: VideoModel, args: argparse.Namespace, preset: str = "balanced", error_weight: float = -1
) -> Record:
    """One run with the patch node, every step sparse."""
    patched = patch_model(patcher, args, preset, error_weight)
    patch = pack("nodes.attention_patch").AttentionPatch.find(patched)
    record = sample_timed(patched, model, AttentionClock(model.tokens), args.steps)
    run = patch.last_run
    if run.sparse_steps < run.steps:
        raise RunFailed(f"not every step was sparse: {run}")
    record |= {"error_weight": patch.settings.preset.config.error_weight, "density": run.density}
    return record | ({"dense_calls": run.as_json()["dense_calls"]} if run.dense_calls else {})


def patch_model(patcher: Any, args: argparse.Namespace, preset: str, error_weight: float = -1) -> Any:
    """A clone with the patch node's settings: sparse from the first step to the last, at one weight if it is given."""
    nodes = pack("nodes.attention_patch")
    family = nodes.identify(patcher.get_model_object("diffusion_model")).preset_family
    flat = {"start_percent": 0.0, "end_percent": 1.0} | ({"min_tokens": 0} if args.tiny else {})
    if error_weight >= 0:
        flat |= {"ramp": 0.0, "block_weights": {}}
    output = nodes.PSAAttentionPatch.execute(
        patcher,
        preset,
        pack("psa_core.presets").change(nodes.load_preset(f"{family}/{preset}"), {}, flat),
        error_weight=error_weight,
        backend="auto" if torch.cuda.is_available() else "reference",
    )
    return output.result[0]


def sample_timed(patcher: Any, model: VideoModel, clock: AttentionClock, steps: int) -> Record:
    """Sample and note what a step takes; the first one, in which kernels compile, is not counted."""
    cuda = torch.cuda.is_available()
    ends: list[float] = []

    def step_ended(*_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        if not ends:
            clock.restart()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        ends.append(time.perf_counter())

    clock.attach(patcher)
    comfy_models.sample(patcher, model, steps, step_ended)
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "seconds_per_step": statistics.median(seconds),
        "attention_share": clock.seconds() / sum(seconds),
        "attention_calls_per_step": clock.calls / len(seconds),
        "peak_vram_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }


class SelfAttentionHook:
    """Stands in front of a model's attention, PSA's included, and sees the calls over the whole video.

    Args:
        tokens: Length of the model's sequence.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._previous: Callable[..., Tensor] | None = None

    def attach(self, patcher: Any) -> None:
        """Install behind all wrappers that the model has."""
        patcher.add_wrapper_with_key("diffusion_model", "psa_benchmark", self._around_model_call)

    def _around_model_call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        override = pack("nodes.override")
        options = override.name_arguments(executor.original, args, kwargs)["transformer_options"]
        self._previous = options.get(override.OVERRIDE_KEY)
        with override.replaced(options, {override.OVERRIDE_KEY: self}):
            return executor(*args, **kwargs)

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        def attend() -> Tensor:
            return func(*args, **kwargs) if self._previous is None else self._previous(func, *args, **kwargs)

        call = pack("nodes.override").AttentionCall.read(*args, **kwargs)
        if call is None or not call.q.shape[-2] == call.k.shape[-2] == self._tokens:
            return attend()
        return self.see(call, attend)

    def see(self, call: Any, attend: Callable[[], Tensor]) -> Tensor:
        """Answer a self-attention call; ``attend`` is what would happen without this hook."""
        raise NotImplementedError


class AttentionClock(SelfAttentionHook):
    """Times the video's self-attention.

    Args:
        tokens: Length of the model's sequence.
        kernel: PyTorch's kernel to compute it with; None for what would compute it anyway.
    """

    def __init__(self, tokens: int, kernel: SDPBackend | None = None) -> None:
        super().__init__(tokens)
        self._kernel = kernel
        self._spans: list[tuple[Any, Any]] = []

    def see(self, call: Any, attend: Callable[[], Tensor]) -> Tensor:
        start = _now()
        out = attend() if self._kernel is None else self._compute(call)
        self._spans.append((start, _now()))
        return out

    def _compute(self, call: Any) -> Tensor:
        if reason := call.unsupported_reason():
            raise RunFailed(reason)
        with sdpa_kernel(self._kernel):
            out = scaled_dot_product_attention(*map(call.heads_first, (call.q, call.k, call.v)), scale=call.scale)
        result: Tensor = call.output(out)
        return result

    def restart(self) -> None:
        """Forget what was timed."""
        self._spans.clear()

    @property
    def calls(self) -> int:
        """Self-attention calls since the start."""
        return len(self._spans)

    def seconds(self) -> float:
        """Time in them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(end) for start, end in self._spans) / 1000)
        return float(sum(end - start for start, end in self._spans))


class KeptInputs(SelfAttentionHook):
    """Keeps the self-attention inputs of blocks spread evenly over a model, from one step.

    Args:
        model: The model that will be sampled.
        step: Which step of its run, from 0 on.
    """

    def __init__(self, model: VideoModel, step: int) -> None:
        super().__init__(model.tokens)
        self._layout = pack("psa_core").TokenLayout(model.grid, video_start=model.text if model.joint_text else 0)
        blocks, kept = model.settings["num_layers"], min(model.settings["num_layers"], PROBED_BLOCKS)
        self._wanted = {step * blocks + (2 * part + 1) * blocks // (2 * kept) for part in range(kept)}
        self._seen = 0
        self._kept: list[tuple[Tensor, ...]] = []

    def see(self, call: Any, attend: Callable[[], Tensor]) -> Tensor:
        if self._seen in self._wanted:
            self._kept.append(tuple(call.heads_first(x)[:1].clone() for x in (call.q, call.k, call.v)))
        self._seen += 1
        return attend()

    def error_weight(self, config: Any, density: float) -> float:
        """The weight with which a config has a density in the mean over what was kept."""
        core = pack("psa_core")
        order = core.plan_order(self._layout, config, self._kept[0][0].device)

        def density_of(weighted: Any) -> float:
            same = replace(config, error_weight=weighted.error_weight)
            stats = [
                core.psa_attention(q, k, v, layout=self._layout, config=same, order=order, stats=True)[1]
                for q, k, v in self._kept
            ]
            return float(torch.stack([each.density.mean() for each in stats]).mean())

        return float(pack("psa_core.bench").config_of_density(density_of, density).error_weight)


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def pack(name: str) -> Any:
    """A module of the pack, as ComfyUI imports it."""
    return importlib.import_module(f"{comfy_models.PACK}.{name}")


def release_memory() -> None:
    """Give back what the last run or model took."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache(force=True)


def print_record(record: Record) -> None:
    """One line of the record that matters."""
    name = f"{record['model']:<14} {record['tokens']:>6} tokens  {record['method']:<12} {record['preset']:<13}"
    if "failed" in record:
        print(f"{name} {record['failed']}", flush=True)
        return
    numbers = f"{record['seconds_per_step']:8.3f} s a step, {record['attention_share']:.0%} of it self-attention"
    peak = "" if record["peak_vram_mib"] is None else f"  peak {record['peak_vram_mib']:.0f} MiB"
    print(f"{name} {numbers}  density {record['density']:.3f}{peak}", flush=True)


if __name__ == "__main__":
    main()

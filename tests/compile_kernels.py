"""Compile every kernel launch of a call for a GPU that need not be here, and report what it takes.

Run as a program: ``python tests/compile_kernels.py 80 86 90`` prints one JSON object per kernel and target.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

try:
    from triton.backends.compiler import AttrsDescriptor  # Triton 3.2
except ImportError:
    AttrsDescriptor = None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psa_core.backends.triton as backend
from psa_core import PSAConfig, TokenLayout, plan_order
from psa_core.backends.triton import plan

POINTER_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
RANKED = PSAConfig(
    selection="topk",
    levels=(1, 2, 4, 8, "skip"),
    ranges=((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)),
    similarity_caps=((2, 0.7), (4, 0.65), (8, 0.6)),
)
RANKED_ONLY = ("_similarity_kernel", "_level_kernel")  # the others are the same as without a ranking
TUNED = "_attend_kernel"  # the one whose settings differ between GPUs
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")


LAYOUT = TokenLayout((4, 16, 24), video_start=16)


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recording(sm: int) -> Iterator[list[Launch]]:
    """Kernel, arguments and keywords of every launch inside, none of which runs, with the settings for ``sm``."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    original, capability = JITFunction.run, plan.capability
    JITFunction.run = note
    plan.capability = lambda device: sm
    try:
        yield launches
    finally:
        JITFunction.run = original
        plan.capability = capability


def record_launches(
    head_dim: int, dtype: torch.dtype, config: PSAConfig, sm: int, layout: TokenLayout = LAYOUT, heads: int = 2
) -> list[Launch]:
    """Every launch of one call."""
    order = plan_order(layout, config, "cpu")
    q = torch.zeros(1, layout.tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
    with recording(sm) as launches:
        prepared = backend.prepare(q, q, q, order, config, head_dim**-0.5)
        selection = backend.select(prepared, backend.importance(prepared))
        backend.attend(prepared, selection, torch.empty_like(q))
    return launches


Specialization = tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]


def specialize(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Specialization:
    """What a launch is compiled for: argument types, constants, and arguments known to be divisible by 16."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        value, parameter = values[name], kernel.params[position]
        is_special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_special and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_name(value)
        if isinstance(value, torch.Tensor) or (is_special and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], sm: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one launch compiled for ``sm``."""
    options = {name: kwargs[name] for name in LAUNCH_OPTIONS if name in kwargs}
    signature, constants, attributes = specialize(kernel, args, kwargs)
    if AttrsDescriptor is not None:
        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        attributes = AttrsDescriptor()
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return {"kernel": kernel.__name__, "sm": sm, "shared": compiled.metadata.shared} | _resources(compiled.asm["cubin"])


def _type_name(value: Any) -> str:
    """How Triton's signatures call an argument's type."""
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype]
    if isinstance(value, int | float):
        return "fp32" if isinstance(value, float) else "i32"
    return f"tensordesc<{POINTER_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


# One GPU of each generation of matrix units, the one with the least shared memory.
GENERATIONS = (86, 90, 100, 120)


def all_cases(sm: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kernel in half and full precision on one GPU of each generation; on the others the one with own settings.

    In full precision only shared memory is asked for: the larger head dim takes more, and sm_120 what sm_86 takes.
    """
    for head_dim in (64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and (head_dim == 64 or sm not in GENERATIONS or sm == 120):
                continue
            for kernel, args, kwargs in record_launches(head_dim, dtype, PSAConfig(error_weight=0.01), sm):
                if sm in GENERATIONS or kernel.__name__ == TUNED:
                    yield f"{dtype} D{head_dim}", compile_launch(kernel, args, kwargs, sm)
            for kernel, args, kwargs in record_launches(head_dim, dtype, RANKED, sm):
                if sm in GENERATIONS and kernel.__name__ in RANKED_ONLY:
                    yield f"{dtype} D{head_dim} ranked", compile_launch(kernel, args, kwargs, sm)


if __name__ == "__main__":
    for target in map(int, sys.argv[1:]):  # one after the other: a compilation takes about a second
        for case, result in all_cases(target):
            print(json.dumps({"case": case} | result), flush=True)

"""What can run here, as data: what each backend needs, and why one cannot serve a call."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Needs:
    """What a backend takes and what it has to have.

    Args:
        dtypes: Of queries, keys and values.
        head_dims: Their last dimension.
        devices: Types of devices; empty for any.
        least_capability: Compute capability of a CUDA device at least, as ``(major, minor)``; None for any.
        package: Python package that must be installed; empty for none.
        gradients: Whether the output can be differentiated.
    """

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] = HEAD_DIMS
    devices: tuple[str, ...] = ()
    least_capability: tuple[int, int] | None = None
    package: str = ""
    gradients: bool = True


NEEDS = {
    "triton": Needs(
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        devices=("cuda",),
        least_capability=(8, 0),
        package="triton",
        gradients=False,
    ),
    "reference": Needs(dtypes=(torch.bfloat16, torch.float16, torch.float32, torch.float64)),
}

# What each code of a reason says, with the values that it carries.
REASONS = {
    "triton_missing": "Triton is not installed; install the {package} release that fits torch {torch}",
    "dtype": "Triton kernels take bf16, fp16 and fp32, not {dtype}",
    "head_dim": "head dim {head_dim} is not one of {allowed}",
    "gradients": (
        "Triton kernels compute no gradients, and the inputs require them; take the backend 'reference', "
        "or call under torch.no_grad()"
    ),
    "amd": "the Triton kernels are written for NVIDIA GPUs; AMD ones are not supported yet",
    "capability": "the GPU is sm_{capability}; the Triton kernels need sm_80 (Ampere) or newer",
    "device": "Triton kernels run on CUDA devices, not on {device}",
    "only_reference": "PSA is made for NVIDIA GPUs; on {device} only the backend 'reference' works, slowly",
}


@dataclass(frozen=True)
class Reason:
    """Why something cannot run; ``str`` is its English.

    Args:
        code: One of :data:`REASONS`.
        values: What that sentence's places hold.
    """

    code: str
    values: Mapping[str, str | int] = field(default_factory=dict)

    def __str__(self) -> str:
        return REASONS[self.code].format_map(self.values)


def reason_against(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool = False
) -> Reason | None:
    """Why a backend cannot serve such a call here, or None if it can.

    Args:
        backend: ``triton`` or ``reference``.
        device: Where queries, keys and values are.
        dtype: Theirs.
        head_dim: Theirs.
        gradients: Whether the output will be differentiated.
    """
    needs = NEEDS[backend]
    if needs.package and find_spec(needs.package) is None:
        package = f"{needs.package}-windows" if sys.platform == "win32" else needs.package
        return Reason(f"{needs.package}_missing", {"package": package, "torch": torch.__version__})
    if dtype not in needs.dtypes:
        return Reason("dtype", {"dtype": str(dtype)})
    if head_dim not in needs.head_dims:
        return Reason("head_dim", {"head_dim": head_dim, "allowed": ", ".join(map(str, needs.head_dims))})
    if gradients and not needs.gradients:
        return Reason("gradients")
    return _reason_against_device(needs, device)


def _reason_against_device(needs: Needs, device: torch.device) -> Reason | None:
    if not needs.devices or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if device.type not in needs.devices:
        return Reason("device", {"device": device.type})
    if torch.version.hip:
        return Reason("amd")
    capability = torch.cuda.get_device_capability(device)
    if needs.least_capability is not None and capability < needs.least_capability:
        return Reason("capability", {"capability": "{}{}".format(*capability)})
    return None

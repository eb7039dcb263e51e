"""Triton's own errors, as it raises them: the run ends dense and says why, and the next one is sparse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from psa_pack.psa_core.capability import reason_against

from conftest import ROOT

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        (reason := reason_against("triton", torch.device("cpu"), torch.float32, 64)) is not None, reason=str(reason)
    ),
]

# Compiled without the interpreter, so in a process of its own. Prints why the run was dense, and the next one's counts.
PROGRAM = """
import sys, torch
sys.path[:0] = [{tests!r}, {comfyui!r}]
import comfy.cli_args
comfy.cli_args.args.cpu = True
from pack import load_pack
load_pack()
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources
from psa_pack.psa_core.backends import reference
from runs import record
from test_nodes_patch import SPARSE, patch
from tiny_wan import make_model, sample

@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), unknown_name)

def compile_wrong(*args):
    signature = {{"x_ptr": "*fp32", "BLOCK": "constexpr"}}
    triton.compile(ASTSource(wrong_kernel, signature, {{"BLOCK": 16}}), target=GPUTarget("cuda", 80, 32))

def launch_too_large(*args):
    raise OutOfResources(300000, 232448, "shared memory")

model = make_model()
dense, prepare = sample(model), reference.prepare
patched = patch(model, **SPARSE)
reference.prepare = {fault}
assert torch.equal(sample(patched), dense)
print(*record(patched).dense_calls)
reference.prepare = prepare
sample(patched)
print(record(patched).sparse_calls, record(patched).dense_calls)
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("compile_wrong", ("because PSA could not run (CompilationError: ", "unknown_name is not defined")),
        ("launch_too_large", ("because PSA could not run (OutOfResources: out of resource: shared memory",)),
    ],
)
def test_the_run_ends_dense_and_the_next_one_is_sparse(
    comfyui: Path, fault: str, said: tuple[str, ...], tmp_path: Path
) -> None:
    program = PROGRAM.format(tests=str(ROOT / "tests"), comfyui=str(comfyui), fault=fault)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "program.py"  # Triton reads a kernel's source
    file.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reason, after = done.stdout.splitlines()[-2:]
    for part in said:
        assert part in reason
    assert after == "8 {}"

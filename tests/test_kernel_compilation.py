"""Every kernel compiles for every GPU generation it is meant for, within its shared memory and registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)

SHARED_MEMORY_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
KERNELS_PER_CALL = 9 + 2  # the pyramid kernel runs for keys and for values; two differ where levels go by rank
COMPILED = {80: 2, 86: 3 * KERNELS_PER_CALL, 89: 2, 90: 3 * KERNELS_PER_CALL, 100: 3 * KERNELS_PER_CALL,
            120: 2 * KERNELS_PER_CALL}  # fmt: skip
HERE = Path(__file__).resolve().parent
SPILLED_BYTES = 16  # at most, of a thread: a few words that are kept outside of every loop
# Measured: settings that keep all in registers take longer (benchmarks/results/kernel-settings-*.json).
FASTER_WITH_SPILLS = {
    (90, "torch.bfloat16 D128", "_attend_kernel"): 320,
    (90, "torch.bfloat16 D64", "_attend_kernel"): 200,
}


def run_compiling(*program: str, cache: Path | None = None) -> str:
    """What a Python program says, in which Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    run = subprocess.run([sys.executable, *program], cwd=HERE, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sm", SHARED_MEMORY_KIB)
def test_kernels_fit(sm: int) -> None:
    if IS_OLD and sm >= 100:
        pytest.skip(f"the compiler in Triton {triton.__version__} does not know sm_{sm}")
    said = run_compiling("compile_kernels.py", str(sm))  # into Triton's own cache, which knows a kernel by its source
    results = [json.loads(line) for line in said.splitlines()]
    assert len(results) == COMPILED[sm]
    too_big = [result for result in results if result["shared"] > SHARED_MEMORY_KIB[sm] * 1024]
    assert not too_big
    if IS_OLD:
        return  # it spills more; the settings are tuned with newer ones
    spilling = [
        result
        for result in results
        if "float32" not in result["case"]  # right there, not tuned
        and result["stack"] > FASTER_WITH_SPILLS.get((sm, result["case"], result["kernel"]), SPILLED_BYTES)
    ]
    assert not spilling


CHECKED_PROGRAM = """
from dataclasses import replace
from pathlib import Path
import torch
from compile_kernels import LAUNCH_OPTIONS, record_launches, recording, specialize
from psa_core import PSAConfig, TokenLayout, backends
from psa_core.presets import load_presets
from psa_core.self_check import SelfCheckFailed, representative, self_check

backends.reason_against = lambda *args: None  # nothing is launched
SIZES = [((3, 7, 11), 0, 5), ((4, 16, 18), 226, 16), ((1, 40, 40), 0, 1)]
LARGE = [((21, 30, 52), 0, 12), ((13, 30, 45), 226, 48)]

def specialised(launches):
    return {
        (kernel.__name__, repr(specialize(kernel, args, kwargs)), *(kwargs.get(name) for name in LAUNCH_OPTIONS))
        for kernel, args, kwargs in launches
    }

configs = {
    f"{path.stem} {name}": preset.config
    for path in sorted(Path("../presets").glob("*.yaml")) for name, preset in load_presets(path).items()
}
usual = PSAConfig(error_weight=0.3)
for changes in ({"query_block": 64}, {"levels": (1, 4)}, {"importance_stride": 1}, {"variance_term": False}):
    configs[str(changes)] = replace(usual, **changes)
checks = {}
for name, config in configs.items():
    kind = representative(config)
    if kind not in checks:
        with recording(90) as launches:
            try:
                self_check(torch.device("cpu"), torch.bfloat16, 128, "triton", config)
                raise AssertionError(f"{name}: it looked at no result")
            except SelfCheckFailed:
                pass
        checks[kind] = specialised(launches)
        assert len(checks[kind]) >= 9, name
    for grid, text, heads in SIZES + LARGE * (name == "wan2.1_14b balanced"):
        layout = TokenLayout(grid, video_start=text)
        called = specialised(record_launches(128, torch.bfloat16, config, 90, layout, heads))
        assert called <= checks[kind], (name, grid, called - checks[kind])
print(len(configs))
"""


def test_what_every_preset_launches_was_checked_at_every_size() -> None:
    assert int(run_compiling("-c", CHECKED_PROGRAM)) > 30


AHEAD_PROGRAM = """
import torch
from compile_kernels import LAYOUT, RANKED, record_launches, recording, specialize
from psa_core import PSAConfig, plan_order
from psa_core.backends.triton.warm_up import attend_to_nothing

for config in (PSAConfig(error_weight=0.001), PSAConfig(error_weight=0.001, query_block=64, key_block=32), RANKED):
    for head_dim in (64, 128):
        for sm in (80, 90):
            q = torch.zeros(1, LAYOUT.tokens, 2, head_dim, dtype=torch.bfloat16).transpose(1, 2)
            with recording(sm) as ahead:
                attend_to_nothing(q, plan_order(LAYOUT, config, "cpu"), config, head_dim**-0.5)
            called = record_launches(head_dim, torch.bfloat16, config, sm)[-1]
            assert called[0].__name__ == "_attend_kernel"
            ((kernel, args, kwargs),) = ahead
            assert kernel is called[0] and specialize(kernel, args, kwargs) == specialize(*called), (head_dim, sm)
"""


def test_what_is_compiled_ahead_is_what_a_call_launches() -> None:
    run_compiling("-c", AHEAD_PROGRAM)


WARM_UP_PROGRAM = """
import os
from pathlib import Path
import torch
from psa_core import PSAConfig, TokenLayout, plan_order, psa_attention
from psa_core.backends import resolve

def count_kernels():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

layout = TokenLayout((4, 9, 20), video_start=40)
config = PSAConfig(
    selection="topk", levels=(1, 2, 8, "skip"), ranges=((0, 0.2), (0.2, 0.4), (0.4, 0.7), (0.7, 1)),
    similarity_caps=((2, 0.7), (8, 0.6)), key_block=32, importance_stride=1,
)
q, k, v = torch.randn(3, 1, 2, layout.tokens, 64, device="cuda", dtype=torch.bfloat16)
resolve("triton", q).warm_up(q, k, v, plan_order(layout, config, "cuda"), config, 0.125)
before = count_kernels()
psa_attention(q, k, v, layout=layout, config=config, backend="triton", stats=True)
torch.cuda.synchronize()
assert before == count_kernels() == 10, (before, count_kernels())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_after_the_warm_up_a_call_compiles_nothing(tmp_path: Path) -> None:
    run_compiling("-c", WARM_UP_PROGRAM, cache=tmp_path)

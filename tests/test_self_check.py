"""The self-check finds a wrong kernel on its first call and says what to report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from psa_pack.psa_core.capability import reason_against

from mutants import KERNEL_FAULTS, MUTANTS, RESULTS, Mutant, copy_with, is_killed, mutated

FIRST_CALL = """
import torch
from psa_core import PSAConfig
from psa_core.self_check import SelfCheckFailed, self_check
try:
    self_check(torch.device("cpu"), torch.float32, 64, "triton", PSAConfig(error_weight=0.0017))
except SelfCheckFailed as error:
    print(error)
"""


@pytest.mark.interpreter
@pytest.mark.skipif(
    (reason := reason_against("triton", torch.device("cpu"), torch.float32, 64)) is not None, reason=str(reason)
)
@pytest.mark.parametrize("fault", [None, *KERNEL_FAULTS.values()], ids=["no fault", *KERNEL_FAULTS])
def test_a_wrong_kernel_is_found_on_its_first_call(fault: Mutant | None, tmp_path: Path) -> None:
    pack = copy_with(fault or Mutant("config.py", "MAX_TILE_EXTENT = 64", "MAX_TILE_EXTENT = 65", ""), tmp_path)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], cwd=pack, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if fault is None:
        assert done.stdout == ""
        return
    assert done.stdout.startswith("self-check of backend triton on cpu, torch.float32, head dim 64: ")
    assert "; please report this line as a bug of PSA Attention (torch " in done.stdout
    for fact in (torch.__version__, "Triton 3.", platform.system()):
        assert fact in done.stdout


@pytest.mark.parametrize(
    "mutant", [*MUTANTS, *KERNEL_FAULTS.values()], ids=lambda mutant: f"{mutant.file}: {mutant.after}"
)
def test_a_mutants_place_is_still_there(mutant: Mutant) -> None:
    compile(mutated(mutant), mutant.file, "exec")  # a fault, not a file that no longer loads


def test_the_recorded_mutants_are_these_and_all_were_killed() -> None:
    recorded = json.loads(RESULTS.read_text("utf-8"))
    sample = [{**asdict(mutant), "fate": "killed"} for mutant in MUTANTS]
    assert recorded["sample"] == sample, "run `make mutants`"
    assert recorded["mutants"] == recorded["killed"] == len(MUTANTS) == 50


@pytest.mark.parametrize("mutant", MUTANTS[::13], ids=lambda mutant: f"{mutant.file}: {mutant.after}")
def test_a_mutant_is_killed(mutant: Mutant) -> None:
    """A few of them; `make mutants` tries them all."""
    assert is_killed(mutant)

"""The record of a patched model's latest run, as tests ask for it."""

from __future__ import annotations

from typing import Any


def record(patched: Any) -> Any:
    """The record of the latest run of a patched model."""
    from psa_pack.nodes.attention_patch import AttentionPatch

    return AttentionPatch.find(patched).last_run


def reasons(run: Any) -> dict[str, int]:
    """The dense calls of a record by their reasons in English."""
    return {str(reason): count for reason, count in run.dense_calls.items()}

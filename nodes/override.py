"""How ComfyUI calls attention: layouts, keyword arguments, containers, and the overrides of other nodes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..psa_core import PSAConfig
from ..psa_core.capability import HEAD_DIMS
from .models.sequence import Block, VideoSequence
from .session import Session
from .shared_by_copies import PartOfARun
from .words import Words

OVERRIDE_KEY = "optimized_attention_override"

Options = dict[str, Any]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, as ComfyUI's models make it.

    Args:
        q: Queries ``[B, N, H * D]``, or ``[B, H, N, D]`` with ``skip_reshape``; k and v likewise.
        heads: Number of heads.
        skip_output_reshape: The output is wanted as ``[B, H, N, D]`` instead of ``[B, N, H * D]``.
        scale: Softmax scale; None for ``D ** -0.5``.
        others: Arguments that PSA does not know.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    attn_precision: torch.dtype | None
    skip_reshape: bool
    skip_output_reshape: bool
    scale: float | None
    options: Options
    others: tuple[str, ...]

    @classmethod
    def read(
        cls,
        q: Any,
        k: Any,
        v: Any,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None,
        transformer_options: Options | None = None,
        low_precision_attention: bool = True,  # asks for no int8; PSA computes in q's own precision
        enable_gqa: bool = False,  # fewer k than q heads, which equal shapes rule out
        _inside_attn_wrapper: bool = True,
        **others: Any,
    ) -> AttentionCall | None:
        """Sort the arguments of a call; None when they are not plain tensors."""
        if not all(isinstance(tensor, Tensor) and tensor.dim() == (4 if skip_reshape else 3) for tensor in (q, k, v)):
            return None
        return cls(
            q=q,
            k=k,
            v=v,
            heads=heads,
            mask=mask,
            attn_precision=attn_precision,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
            scale=scale,
            options={} if transformer_options is None else transformer_options,
            others=tuple(name for name, value in others.items() if value is not None),
        )

    def heads_first(self, tensor: Tensor) -> Tensor:
        """View q, k or v as ``[B, H, N, D]``."""
        return tensor if self.skip_reshape else tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def output(self, out: Tensor) -> Tensor:
        """Bring an output ``[B, H, N, D]`` into the layout that the caller expects."""
        return out if self.skip_output_reshape else out.transpose(1, 2).flatten(2)

    def output_heads_first(self, out: Tensor) -> Tensor:
        """View an output in the caller's layout as ``[B, H, N, D]``."""
        return out if self.skip_output_reshape else out.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def unsupported_reason(self) -> Words | None:
        """Why PSA cannot compute this call, or None if it can."""
        if self.mask is not None:
            return Words.of("mask")
        if self.attn_precision not in (None, self.q.dtype):
            return Words.of("precision", dtype=self.attn_precision)
        if self.others:
            return Words.of("unknown_arguments", names=self.others)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (self.q, self.k, self.v)):
            return Words.of("gradients")
        head_dim = self.heads_first(self.q).shape[-1]
        if head_dim not in HEAD_DIMS:
            return Words.of("head_dim", head_dim=head_dim, allowed=HEAD_DIMS)
        return None


class AttentionOverride(PartOfARun):
    """Answers the attention calls of one call of a video model: its own self-attention, and everything else unseen.

    Args:
        session: The sampling run that decides.
        sequence: The model's tokens in this call.
        previous: Override of another node; it gets every call that does not go sparse.
    """

    def __init__(self, session: Session, sequence: VideoSequence, previous: Callable[..., Tensor] | None) -> None:
        self._session = session
        self._sequence = sequence
        self._previous = previous
        self._block: Block | None = None
        # The blocks to come, where each makes one call.
        self._counted = iter(sequence.block_order if sequence.one_call_per_block else ())
        self._video_calls = 0
        # Calls with single-owner tensor containers are only for overrides that say they take them.
        if (container_function := getattr(previous, "container_function", None)) is not None:
            self.container_function = container_function

    # A gate that torch.compile traced would be frozen at its first answer.
    @torch.compiler.disable
    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self._sequence.one_call_per_block:
            self._block = next(self._counted, None)
        call = AttentionCall.read(*args, **kwargs)
        dense = partial(func if self._previous is None else partial(self._previous, func), *args, **kwargs)
        if call is None or not self._spans_the_video(call):
            self._session.count_other()
            return dense()
        block = self._block_number(call)
        place, self._video_calls = self._video_calls if block is None else block, self._video_calls + 1
        admitted = self._admit(call, block)
        if isinstance(admitted, Words):
            self._session.count_dense(admitted)
        else:
            q, k, v = map(call.heads_first, (call.q, call.k, call.v))
            out = self._session.attend(
                q, k, v, self._sequence.layout, admitted, call.scale, place, lambda: call.output_heads_first(dense())
            )
            if out is not None:
                return call.output(out)
        with self._session.timed_dense(call.q, self._sequence.layout.tokens, place):
            return dense()

    def _spans_the_video(self, call: AttentionCall) -> bool:
        same = call.q.shape == call.k.shape == call.v.shape
        return same and call.q.shape[2 if call.skip_reshape else 1] == self._sequence.layout.tokens

    def _block_number(self, call: AttentionCall) -> int | None:
        order, block = self._sequence.block_order, self._block
        if not self._sequence.side_blocks:  # whose calls carry the index of the block before them
            block = order.named_in(call.options) or block
        return None if block is None else order.number(block)

    def _admit(self, call: AttentionCall, block: int | None) -> PSAConfig | Words:
        if self._sequence.layout.tokens in self._sequence.context_lengths:
            return Words.of("context_as_long")
        admitted = self._session.admit(self._sequence.layout, block)
        return admitted if isinstance(admitted, Words) else call.unsupported_reason() or admitted

    def entries(self, options: Options) -> Options:
        """What to replace in the options of a model call, so that its attention comes here.

        Args:
            options: The call's ``transformer_options``.
        """
        entries: Options = {OVERRIDE_KEY: self}
        if self._session.needs_blocks:
            # ComfyUI 0.3.x does not tell attention which block it is in.
            replacements = options.get("patches_replace", {})
            blocks = dict(replacements.get("dit", {}))
            for key, block in self._sequence.block_order.by_replace_key().items():
                blocks[key] = self._tracked_block(block, blocks.get(key))
            entries["patches_replace"] = {**replacements, "dit": blocks}
        return entries

    def _tracked_block(self, block: Block, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        @torch.compiler.disable(recursive=False)
        def run_block(arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
            self._block = block
            try:
                return extra["original_block"](arguments) if previous is None else previous(arguments, extra)
            finally:
                self._block = self._sequence.side_blocks.get(block)

        return run_block


@contextmanager
def replaced(options: Options, entries: Options) -> Iterator[None]:
    """Put entries into a dictionary, and restore afterwards what was there."""
    before = {key: options[key] for key in entries if key in options}
    options.update(entries)
    try:
        yield
    finally:
        for key in entries:
            options.pop(key, None)
        options.update(before)


def owner_of(override: Callable[..., Any] | None) -> str:
    """The Python module that an override comes from, which tells the node that installed it; empty without one."""
    if override is None:
        return ""
    module = getattr(override, "__module__", None) or type(override).__module__
    return re.split(r"[/\\]", module)[-1]  # ComfyUI names custom nodes by their path


def name_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their names, those that ``**kwargs`` collects included.

    Raises:
        TypeError: the function does not take these arguments.
    """
    signature = inspect.signature(function)
    named = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named

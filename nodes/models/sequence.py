"""The tokens of one call of a video model, and the transformer blocks that they go through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...psa_core import TokenLayout
from ..words import Words


class UnsupportedModel(Exception):
    """PSA cannot tell what this model is doing; ``words`` say why."""

    def __init__(self, words: Words) -> None:
        super().__init__(words)
        self.words = words


@dataclass(frozen=True)
class Block:
    """A transformer block: the name of its stack, and its index there, from 0."""

    stack: str
    index: int


@dataclass(frozen=True)
class Stack:
    """Transformer blocks of one kind, which a model runs one after the other.

    Args:
        name: What ComfyUI calls it in ``block_type``, where it does; a model's stacks differ in it.
        size: Number of its blocks.
        replace_key: What ComfyUI's block replacements call it; empty where it has none for these blocks.
    """

    name: str
    size: int
    replace_key: str = ""


@dataclass(frozen=True)
class BlockOrder:
    """All blocks of a model, stack after stack. The place of a block in it is the number that users know it by."""

    stacks: tuple[Stack, ...]

    def __len__(self) -> int:
        return sum(stack.size for stack in self.stacks)

    def __iter__(self) -> Iterator[Block]:
        return (Block(stack.name, index) for stack in self.stacks for index in range(stack.size))

    def number(self, block: Block) -> int:
        """Place of a block in the order."""
        before = 0
        for stack in self.stacks:
            if stack.name == block.stack:
                return before + block.index
            before += stack.size
        raise KeyError(block)

    def named_in(self, options: Mapping[str, Any]) -> Block | None:
        """The block that ``transformer_options`` name, if they do; without a type it is one of the first stack."""
        index = options.get("block_index")
        name = options.get("block_type", self.stacks[0].name)
        if isinstance(index, int) and any(stack.name == name and 0 <= index < stack.size for stack in self.stacks):
            return Block(name, index)
        return None

    def by_replace_key(self) -> dict[tuple[str, int], Block]:
        """The blocks that ComfyUI can replace, by the keys of its ``patches_replace``."""
        return {
            (stack.replace_key, index): Block(stack.name, index)
            for stack in self.stacks
            if stack.replace_key
            for index in range(stack.size)
        }


@dataclass(frozen=True)
class ModelFacts:
    """What a diffusion model is.

    Args:
        preset_family: Name of the preset file made for it.
        notes: What the user should know about that choice.
        block_order: Its transformer blocks.
    """

    preset_family: str
    notes: tuple[Words, ...]
    block_order: BlockOrder


@dataclass(frozen=True)
class VideoSequence:
    """The token sequence of one call of a model.

    Args:
        layout: Where the video is in it.
        context_lengths: Tokens of the texts and images that its cross attention may look at.
        block_order: The model's transformer blocks.
        one_call_per_block: Every block makes exactly one attention call, so that counting them tells the block.
        side_blocks: Blocks that attend to the video right after one of the model's own, by the latter.
    """

    layout: TokenLayout
    context_lengths: frozenset[int]
    block_order: BlockOrder
    one_call_per_block: bool = False
    side_blocks: Mapping[Block, Block] = field(default_factory=dict)


def latent_and_context(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What nearly every video model is called with: the latent ``[B, C, T, H, W]`` and the text ``[B, N, C]``.

    Raises:
        UnsupportedModel: another node has changed the call, or its input is not a video latent.
    """
    if not {"x", "context"} <= arguments.keys():
        raise UnsupportedModel(Words.of("foreign_forward", model=type(model).__name__))
    x: Tensor = arguments["x"]
    if x.dim() != 5:
        raise UnsupportedModel(Words.of("no_video", shape=str(tuple(x.shape))))
    return x, arguments["context"]


def token_grid(shape: Iterable[int], patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along time, height and width of a latent, which models pad to whole patches."""
    time, height, width = (math.ceil(extent / patch) for extent, patch in zip(shape, patch_size, strict=True))
    return time, height, width

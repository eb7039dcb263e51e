"""The small models' whole language: which prompt becomes which embedding. Shared by training and the demo's node."""

from __future__ import annotations

import torch
from torch import Tensor

TEXT_DIM = 4096
EMPTY, MIRRORED = "", "mirrored"
SUBJECTS = ("bunny", "driver", "cyclist", "balls", "orbits")  # what the demo's model knows
# A word is its place here; new ones go to the end, or a trained model would read other words.
WORDS = (EMPTY, MIRRORED, *SUBJECTS, "rabbit", "talker", "bicycle", "gears", "boats")


def embed(words: tuple[str, str]) -> Tensor:
    """Embedding ``[2, 4096]`` of a subject and ``"mirrored"`` or ``""``; two empty words are the empty prompt.

    Raises:
        ValueError: a word is not one of ``WORDS``.
    """
    for word in words:
        if word not in WORDS:
            raise ValueError(f"prompt: {word!r} is not one of {', '.join(map(repr, WORDS))}")
    embedding = torch.zeros(len(words), TEXT_DIM)
    for row, word in enumerate(words):
        embedding[row, WORDS.index(word)] = TEXT_DIM**0.5
    return embedding

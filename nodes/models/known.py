"""Which family a model belongs to, by its class: what is not listed here stays dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..words import Words
from . import cogvideox, wan
from .sequence import BlockOrder, ModelFacts, UnsupportedModel, VideoSequence


class Family(Protocol):
    """What the module of a family says.

    ``TITLE`` is what people call it, ``CLASSES`` are the names of its classes in ComfyUI, ``KNOWN`` those that this
    ComfyUI has: exact classes, not their subclasses, which add tokens and attention calls of their own.
    """

    TITLE: str
    CLASSES: tuple[str, ...]
    KNOWN: tuple[type[nn.Module], ...]

    def facts(self, model: Any) -> ModelFacts:
        """What the model is."""

    def blocks(self, model: Any) -> BlockOrder:
        """Its transformer blocks."""

    def sequence(self, model: Any, arguments: Mapping[str, Any]) -> VideoSequence:
        """The tokens of a call, from the named arguments of its forward function.

        Raises:
            UnsupportedModel: the call is none that PSA can read.
        """


FAMILIES: tuple[Family, ...] = (wan, cogvideox)


def identify(model: nn.Module) -> ModelFacts:
    """Tell what a diffusion model is.

    Raises:
        UnsupportedModel: it is of no class that PSA knows.
    """
    # Some nodes put torch.compile's shell around the model that the user connects.
    model = getattr(model, "_orig_mod", model)
    return _family(model).facts(model)


def read_sequence(model: nn.Module, arguments: Mapping[str, Any]) -> VideoSequence:
    """Derive the token sequence from the named arguments of a diffusion model's forward call.

    Raises:
        UnsupportedModel: the model is of no class that PSA knows, or its input is not a video latent.
    """
    return _family(model).sequence(model, arguments)


def read_sigma(options: Mapping[str, Any]) -> float:
    """Read the noise level of a model call from its ``transformer_options``; waits for the device, once per call.

    Raises:
        UnsupportedModel: the sampler does not say.
    """
    sigmas = options.get("sigmas")
    try:
        sigma = float(sigmas.flatten()[0] if isinstance(sigmas, torch.Tensor) else sigmas)  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError):
        sigma = math.nan
    if math.isnan(sigma):
        raise UnsupportedModel(Words.of("no_sigma"))
    return sigma


def _family(model: nn.Module) -> Family:
    for family in FAMILIES:
        if type(model) in family.KNOWN:
            return family
    known = tuple(Words.of("family_of_classes", classes=each.CLASSES, family=each.TITLE) for each in FAMILIES)
    raise UnsupportedModel(Words.of("unknown_model", model=type(model).__name__, known=known))

"""PSA Attention Patch: sparse self-attention for a video model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io

from ..psa_core import PSAConfig
from ..psa_core.backends import BACKENDS
from ..psa_core.presets import Preset
from ..psa_core.schedule import BlockList, Schedule
from .gate import PatchSettings
from .models.known import identify, read_sequence, read_sigma
from .models.sequence import ModelFacts, UnsupportedModel
from .override import OVERRIDE_KEY, AttentionOverride, Options, name_arguments, owner_of, replaced
from .preset_loader import PresetSocket, checked_preset, load_preset
from .run_record import RunRecord
from .session import Session
from .shared_by_copies import SharedByCopies
from .status import status_line
from .words import Report, Words

PRESET_NAMES = ("balanced", "quality", "fast")
OFF = "off"
KEEP = -1
"""Value of a numeric input that leaves the preset's own in place."""

PROBE_KEY = "psa_quality_probe"
"""Where a run's ``transformer_options`` hold the probe that watches it."""

_KEY = "psa_attention"

_T = TypeVar("_T")


class AttentionPatch(SharedByCopies):
    """What the node leaves on a model: the functions that ComfyUI calls around a sampling run and a model call.

    Nothing of a run is kept here but ``last_run``, the record of the latest one: the run's session travels in the
    run's own options, so that runs of one model, nested ones included, never see each other's.
    """

    def __init__(self, settings: PatchSettings, report: Report) -> None:
        self.settings = settings
        self.last_run: RunRecord | None = None
        self._report = report

    @classmethod
    def find(cls, model: ModelPatcher) -> AttentionPatch | None:
        """The patch on a model or on a clone of it; None if there is none."""
        for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, _KEY):
            return wrapper.__self__
        return None

    def attach(self, model: ModelPatcher) -> None:
        """Install on a model, in place of an earlier patch."""
        detach(model)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, self.around_run)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, self.around_model_call)

    def around_run(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Open a session for a sampling run and close it, however the run ends."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        session = Session(self.settings, model_sampling.percent_to_sigma, self._report, options.get(PROBE_KEY))
        outcome = "failed"
        try:
            with replaced(options, {_KEY: session}):
                result = executor(*args, **kwargs)
            outcome = "finished"
            return result
        except InterruptProcessingException:
            outcome = "interrupted"
            raise
        finally:
            self.last_run = session.finish(outcome)

    # Compiled, its gates would be frozen; the model inside still compiles.
    @torch.compiler.disable(recursive=False)
    def around_model_call(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Install the attention override for one call of the diffusion model."""
        options, entries = _begin_model_call(executor, args, kwargs)
        with replaced(options, entries):
            return executor(*args, **kwargs)


@torch.compiler.disable
def _begin_model_call(
    executor: WrapperExecutor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Options, Options]:
    """The options of a model call and what to replace in them; nothing where PSA cannot tell what the call is."""
    arguments = name_arguments(executor.original, args, kwargs)
    options = arguments.get("transformer_options") or {}
    session: Session | None = options.get(_KEY)
    if session is None:  # not called by a sampler
        return options, {}
    try:
        sequence = read_sequence(executor.class_obj, arguments)
        sigma = read_sigma(options)
    except UnsupportedModel as error:
        session.refuse_model(error.words)
        return options, {}
    previous = options.get(OVERRIDE_KEY)
    session.begin_model_call(sigma, sequence.layout, dense_attention=owner_of(previous))
    return options, AttentionOverride(session, sequence, previous).entries(options)


def detach(model: ModelPatcher) -> None:
    """Take an earlier patch off a model."""
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL):
        model.remove_wrappers_with_key(kind, _KEY)


class PSAAttentionPatch(io.ComfyNode):
    """Patches a model so that its video self-attention runs sparse."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAAttentionPatch",
            display_name="PSA Attention Patch",
            category="model/patch",
            description=(
                "Renders Wan 2.1, Wan 2.2 and CogVideoX videos faster: self-attention over the video spends full "
                "resolution only where it matters (Pyramid Sparse Attention). Put it between the model loader and the "
                "sampler. Models and calls that it does not know run as they would without it, and the node says why."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The video model to speed up. The node changes a copy of it."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESET_NAMES, OFF],
                    default="balanced",
                    tooltip=(
                        "How much to save. balanced: start here. quality: closer to the picture without the node, "
                        "less speed. fast: for drafts. off: change nothing. The numbers behind the names are chosen "
                        "for the model that you connect."
                    ),
                ),
                PresetSocket.Input(
                    "custom_preset",
                    optional=True,
                    tooltip="A preset from PSA Preset Loader, used instead of balanced, quality or fast.",
                ),
                *_advanced_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="A copy of the model, patched. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        preset: str,
        custom_preset: Preset | None = None,
        error_weight: float = KEEP,
        start_percent: float = KEEP,
        end_percent: float = KEEP,
        dense_blocks: str = "",
        min_tokens: int = KEEP,
        backend: str = "auto",
        verbose: bool = False,
    ) -> io.NodeOutput:
        patched = model.clone()
        report = status_line(cls.hidden.unique_id if cls.hidden else None)
        if preset == OFF:
            detach(patched)
            report([Words.of("off")])
            return io.NodeOutput(patched)
        facts: ModelFacts | None = None
        try:
            facts = identify(model.get_model_object("diffusion_model"))
            notes = facts.notes
        except UnsupportedModel as error:
            notes = (error.words,)
        if custom_preset is not None:
            chosen = checked_preset("custom_preset", custom_preset)
            notes = () if facts else notes  # a chosen family needs no note about the detected one
        elif facts is not None:
            chosen = load_preset(f"{facts.preset_family}/{preset}")
        else:
            # Nothing of it will be used, but a run still says why.
            chosen = Preset(preset, "no family", "", "", PSAConfig(error_weight=0.0), Schedule())
        chosen = dataclasses.replace(
            chosen,
            config=_with_error_weight(chosen, error_weight),
            schedule=_with_schedule(chosen.schedule, start_percent, end_percent, dense_blocks, min_tokens),
        )
        settings = PatchSettings(
            title=f"{chosen.family} {chosen.name}",
            notes=notes,
            preset=chosen,
            dense_blocks=chosen.schedule.dense_blocks.resolve(len(facts.block_order)) if facts else frozenset(),
            backend=_checked_backend(backend),
            verbose=verbose,
        )
        report([Words.of("title", title=settings.title), *notes])
        AttentionPatch(settings, report).attach(patched)
        return io.NodeOutput(patched)


def _advanced_inputs() -> list[io.WidgetInput]:
    widgets = [
        io.Float.Input(
            "error_weight",
            default=KEEP,
            min=KEEP,
            max=1e6,
            step=0.0001,
            round=0.000001,
            optional=True,
            tooltip=(
                "How much error a saving may cost. Larger is faster and further from the picture without the node; "
                "0 keeps attention exact; -1 takes the preset's value. Only for presets that select by error, "
                "as the bundled ones do."
            ),
        ),
        io.Float.Input(
            "start_percent",
            default=KEEP,
            min=KEEP,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=(
                "Attention turns sparse after this share of the sampling, 0 to 1. The first steps decide the "
                "composition; keeping them dense stays closer to the picture without the node. -1 takes the preset's."
            ),
        ),
        io.Float.Input(
            "end_percent",
            default=KEEP,
            min=KEEP,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Attention is dense again after this share of the sampling, 0 to 1. -1 takes the preset's.",
        ),
        io.String.Input(
            "dense_blocks",
            default="",
            optional=True,
            tooltip=(
                "Transformer blocks that stay dense, counted from 0: 0, 1, 38-39, -1. Negative numbers count from the "
                "end, so -1 is the last block. Empty takes the preset's."
            ),
        ),
        io.Int.Input(
            "min_tokens",
            default=KEEP,
            min=KEEP,
            max=2**31 - 1,
            optional=True,
            tooltip=(
                "Videos with fewer tokens than this stay dense, because sparse attention would not be faster. A Wan "
                "token is 16 x 16 pixels of 4 frames (32 x 32 with the Wan 2.2 5B model). -1 takes the preset's."
            ),
        ),
        io.Combo.Input(
            "backend",
            options=list(BACKENDS),
            default="auto",
            optional=True,
            tooltip=(
                "What computes it. auto: the fast kernels, which need an NVIDIA GPU and Triton. reference: plain torch "
                "on any device, slow, to see or compare the picture. Where the choice cannot run, attention stays "
                "dense and the node says why."
            ),
        ),
        io.Boolean.Input(
            "verbose", default=False, optional=True, tooltip="Log every sampling step instead of one line per run."
        ),
    ]
    for widget in widgets:
        # ComfyUI 0.3.x has no `advanced` argument, but passes this on all the same.
        widget.extra_dict["advanced"] = True
    return widgets


def _with_error_weight(preset: Preset, error_weight: float) -> PSAConfig:
    if error_weight == KEEP:
        return preset.config
    if preset.config.selection != "error":
        raise ValueError(
            f"error_weight: {error_weight} has no meaning for preset {preset.family} {preset.name}, which selects by "
            f"{preset.config.selection}; only -1 is allowed"
        )
    return _checked(lambda: dataclasses.replace(preset.config, error_weight=error_weight))


def _with_schedule(
    schedule: Schedule, start_percent: float, end_percent: float, dense_blocks: str, min_tokens: int
) -> Schedule:
    values: dict[str, Any] = {"start_percent": start_percent, "end_percent": end_percent, "min_tokens": min_tokens}
    changes = {name: value for name, value in values.items() if value != KEEP}
    if not isinstance(dense_blocks, str) or dense_blocks.strip():
        changes["dense_blocks"] = BlockList.parse(dense_blocks)
    return _checked(lambda: dataclasses.replace(schedule, **changes))


def _checked(change: Callable[[], _T]) -> _T:
    try:
        return change()
    except ValueError as error:
        raise ValueError(f"{error}; {KEEP} takes the preset's value") from None


def _checked_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    return name

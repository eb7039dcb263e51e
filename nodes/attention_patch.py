"""PSA Attention Patch: sparse self-attention for a video model."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io

from ..psa_core import PSAConfig
from ..psa_core.backends import BACKENDS
from ..psa_core.presets import Preset, change
from ..psa_core.schedule import Schedule
from .gate import PatchSettings
from .models.known import identify, read_sequence, read_sigma
from .models.sequence import ModelFacts, UnsupportedModel
from .override import OVERRIDE_KEY, AttentionOverride, Options, name_arguments, owner_of, replaced
from .preset_loader import PresetSocket, checked_preset, load_preset
from .run_record import RunRecord
from .schedule_inputs import KEEP, error_weight_input, given_schedule, given_settings, schedule_inputs
from .session import Session
from .shared_by_copies import SharedByCopies
from .status import status_line
from .words import Report, Words

PRESET_NAMES = ("balanced", "quality", "fast")
OFF = "off"
PROBE_KEY = "psa_quality_probe"
"""Where a run's ``transformer_options`` hold the probe that watches it."""

_KEY = "psa_attention"


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
        changes = given_settings(error_weight), given_schedule(start_percent, end_percent, dense_blocks, min_tokens)
        try:
            chosen = change(chosen, *changes)
        except ValueError as error:
            raise ValueError(f"{error}; {KEEP} takes the preset's value") from None
        stacks = tuple((stack.name, stack.size) for stack in facts.block_order.stacks) if facts else ()
        if facts:
            chosen.schedule.block_weights.resolve(stacks)  # refuses what the model does not have before it is sampled
        settings = PatchSettings(
            title=f"{chosen.family} {chosen.name}",
            notes=notes,
            preset=chosen,
            dense_blocks=chosen.schedule.dense_blocks.resolve(len(facts.block_order)) if facts else frozenset(),
            stacks=stacks,
            backend=_checked_backend(backend),
            verbose=verbose,
        )
        expected = [] if facts is None or chosen.expected_work is None else [chosen.expected_work]
        work = [Words.of("expected_work", work=share) for share in expected]
        report([Words.of("title", title=settings.title), *work, *notes])
        AttentionPatch(settings, report).attach(patched)
        return io.NodeOutput(patched)


def _advanced_inputs() -> list[io.WidgetInput]:
    widgets = [
        error_weight_input("the preset's"),
        *schedule_inputs("the preset's"),
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


def _checked_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    return name

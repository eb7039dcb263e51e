"""PSA Preset Loader: the bundled presets and the user's own."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..psa_core.presets import Preset, PresetError, load_presets

PresetSocket = io.Custom("PSA_PRESET")

_BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "presets"
_USER_PREFIX = "user/"

_log = logging.getLogger(__name__)


class PSAPresetLoader(io.ComfyNode):
    """Reads one preset out of a YAML file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAPresetLoader",
            display_name="PSA Preset Loader",
            category="model/patch",
            description=(
                "Picks a PSA preset by model family and name, bundled or your own, for the custom_preset input of "
                "PSA Attention Patch. Put your own presets into the folder psa_presets inside ComfyUI's user folder, "
                "as .yaml files written like the bundled ones."
            ),
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=_preset_names(),
                    tooltip=(
                        "Model family and preset. Names that begin with user/ come from your own files in the "
                        "psa_presets folder; reload the page after adding one. An edited file is read again by itself."
                    ),
                )
            ],
            outputs=[
                PresetSocket.Output(
                    "psa_preset",
                    display_name="preset",
                    tooltip="The preset, for custom_preset of PSA Attention Patch.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = None) -> bool | str:
        if preset is None:  # left out, or linked from another node, whose answer is not known yet
            return True
        try:
            load_preset(preset)
        except PresetError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, preset: str | None = None) -> str:
        path = _find_file(preset) if isinstance(preset, str) else None
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else "missing"

    @classmethod
    def execute(cls, preset: str) -> io.NodeOutput:
        return io.NodeOutput(load_preset(preset))


def load_preset(choice: str) -> Preset:
    """Read a preset by the name that the loader lists it under.

    Args:
        choice: ``family/name`` for a bundled preset, ``user/file/name`` for one of the user's.

    Raises:
        PresetError: there is no such file or preset, or the file does not hold what it should.
    """
    path = _find_file(choice) if isinstance(choice, str) else None
    if path is None:
        raise PresetError(f"preset: {choice!r} is not there; there are {', '.join(_preset_names())}")
    presets = load_presets(path)
    name = choice.rpartition("/")[2]
    if name not in presets:
        raise PresetError(f"preset: {path.name} has no preset {name!r}; it has {', '.join(presets)}")
    return presets[name]


def checked_preset(parameter: str, value: object) -> Preset:
    """What a node got at a preset input: a workflow may hold anything there instead of a link.

    Raises:
        PresetError: it is no preset.
    """
    if not isinstance(value, Preset):
        raise PresetError(f"{parameter}: {value!r} is no preset; connect PSA Preset Loader or PSA Preset")
    return value


def _find_file(choice: str) -> Path | None:
    stem = choice.rpartition("/")[0]
    own = stem.startswith(_USER_PREFIX)
    folder = user_folder() if own else _BUNDLED_FOLDER
    # Only files that the folder lists: a choice may come from anyone who can queue a prompt.
    return {path.stem: path for path in _files(folder)}.get(stem.removeprefix(_USER_PREFIX))


def _preset_names() -> list[str]:
    names = [f"{path.stem}/{name}" for path in _files(_BUNDLED_FOLDER) for name in load_presets(path)]
    for path in _files(user_folder()):
        try:
            names += [f"{_USER_PREFIX}{path.stem}/{name}" for name in load_presets(path)]
        except PresetError as error:
            # A broken file of the user's must not take the other presets away.
            _log.warning("PSA: leaving out a preset file: %s", error)
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def user_folder() -> Path:
    """Where the user's own presets are."""
    return Path(folder_paths.get_user_directory()) / "psa_presets"

"""PSA Preset Loader: the bundled presets and the user's own."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..psa_core.presets import Preset, PresetError, load_presets, read_file

PresetSocket = io.Custom("PSA_PRESET")

_BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "presets"
_USER_FOLDER = "psa_presets"
_USER_PREFIX = "user/"
_SUFFIXES = (".yaml", ".yml")

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
                "as .yaml or .yml files written like the bundled ones."
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
        try:
            return hashlib.sha256(read_file(path)).hexdigest() if path else "missing"
        except PresetError as error:
            return str(error)

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


def own_file(name: str) -> Path:
    """The user's preset file of a name, without its ending: the one that is there, else where it would be."""
    return _files(_user_folder()).get(name, _user_folder() / f"{name}{_SUFFIXES[0]}")


def shown_path(path: Path) -> str:
    """A preset file of the user's in a message, which may be read on another machine."""
    return f"{_USER_FOLDER}/{path.name}"


def _find_file(choice: str) -> Path | None:
    stem = choice.rpartition("/")[0]
    own = stem.startswith(_USER_PREFIX)
    folder = _user_folder() if own else _BUNDLED_FOLDER
    # Only files that the folder lists: a choice may come from anyone who can queue a prompt.
    return _files(folder).get(stem.removeprefix(_USER_PREFIX))


def _preset_names() -> list[str]:
    names = [f"{stem}/{name}" for stem, path in _files(_BUNDLED_FOLDER).items() for name in load_presets(path)]
    for stem, path in _files(_user_folder()).items():
        try:
            names += [f"{_USER_PREFIX}{stem}/{name}" for name in load_presets(path)]
        except Exception as error:
            # Whatever a file of the user's holds, it must not take the other presets away.
            reason = error if isinstance(error, PresetError) else f"{path.name}: {type(error).__name__}"
            _log.warning("PSA: leaving out a preset file: %s", reason)
    return names


def _files(folder: Path) -> dict[str, Path]:
    """Preset files by their names without the ending; of two that share one, the first ending's."""
    files: dict[str, Path] = {}
    for suffix in _SUFFIXES:
        for path in sorted(folder.glob(f"*{suffix}")):
            files.setdefault(path.stem, path)
    return dict(sorted(files.items()))


def _user_folder() -> Path:
    """Where the user's own presets are."""
    return Path(folder_paths.get_user_directory()) / _USER_FOLDER

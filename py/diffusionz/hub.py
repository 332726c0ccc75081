"""Where a model lies: a folder, a bundled model, or the local cache of a hub that `pull` fills."""

from __future__ import annotations

import os
from typing import Any

from diffusionz._errors import ArgumentError, ModelError

# What a checkpoint needs, in the diffusers layout or Chronos-2's. Weights in other formats, sample pictures and papers
# stay behind.
NEEDED = ("*.json", "*.safetensors", "tokenizer/*")

Path = str | os.PathLike[str]

# The families of models. A bundled model's folder is called FAMILY-NAME.
FAMILIES = ("zimage", "chronos2")

_BUNDLED = os.path.join(os.path.dirname(__file__), "models")


def bundled(family: str | None = None) -> dict[str, str]:
    """The models, of one family or of all, that came with the package: full name, such as "zimage-demo" -> folder."""
    try:
        folders = sorted(os.listdir(_BUNDLED))
    except FileNotFoundError:
        return {}
    families = FAMILIES if family is None else (family,)
    return {folder: os.path.join(_BUNDLED, folder) for folder in folders if folder.partition("-")[0] in families}


def locate(model: Path, family: str | None = None) -> str:
    """The path of `model`: a bundled model's name, a path, or a hub id "org/name" that was pulled before.

    A bundled model goes by its full name ("chronos2-demo"), and within its `family` by the short one ("demo"). Nothing
    is downloaded. A bundled name wins over a folder of the same name (write ./demo for the folder). Raises ModelError.
    """
    name = os.fspath(model)
    if not isinstance(name, str):
        raise TypeError("model must be a str or a path of str")
    if not name:
        raise ArgumentError('model is ""; it must be a folder, a bundled model\'s name, or a hub id')
    if isinstance(model, str) and os.path.basename(name) == name:
        # A dictionary of all bundled models would need a listing; a name needs a look or two.
        full_names = [name] if name.partition("-")[0] in FAMILIES else []
        for full_name in [f"{family}-{name}", *full_names] if family else full_names:
            if os.path.isdir(folder := os.path.join(_BUNDLED, full_name)):
                return folder
    if os.path.exists(name):
        return name
    if isinstance(model, str) and (hub_id := _hub_id(name)):
        cached = _cached(*hub_id)
        if cached is None:
            raise ModelError(f"{name} is no folder and not in the local cache; fetch it with: diffusionz pull {name}")
        return cached
    known = ", ".join(bundled(family)) or "none"
    raise ModelError(f"{name}: no such folder, and no bundled model of that name (bundled: {known})")


def _hub_id(name: str) -> tuple[str, str] | None:
    """(org/name, revision) of "org/name" or "org/name@revision"; None for what is neither."""
    repository, _, revision = name.partition("@")
    parts = repository.split("/")
    if len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts):
        return repository, revision or "main"
    return None


def _cached(repository: str, revision: str) -> str | None:
    """The folder of a pulled model's snapshot, or None.

    The cache's layout is public (blobs/, refs/, snapshots/): reading it here takes a moment, importing the hub's client
    for the same answer takes as long as loading a small model.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    base = os.path.join(HF_HUB_CACHE, "models--" + repository.replace("/", "--"))
    try:
        with open(os.path.join(base, "refs", revision), encoding="ascii") as file:
            commit = file.read().strip()
    except OSError:
        commit = revision  # a commit has no entry in refs/
    folder = os.path.join(base, "snapshots", commit)
    return folder if os.path.isdir(folder) else None


def pull(model: str, *, progress: bool = False) -> str:
    """Downloads what the model "org/name" or "org/name@revision" needs into the local cache; returns its folder.

    Files that are there already are not fetched again, and an interrupted one is resumed. `progress` shows bars on
    stderr. Raises ArgumentError, ModelError.
    """
    hub_id = _hub_id(model)
    if hub_id is None:
        raise ArgumentError(f'"{model}" is not a hub id; it must be org/name or org/name@revision')
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if progress else disable_progress_bars)()
    try:
        folder: Any = huggingface_hub.snapshot_download(hub_id[0], revision=hub_id[1], allow_patterns=list(NEEDED))
    except HFValidationError as error:
        raise ArgumentError(_first_line(error)) from None
    except Exception as error:  # the client raises its own errors, its HTTP library's and the system's
        raise ModelError(f"{model} cannot be fetched: {_first_line(error)}") from error
    return str(folder)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Finds the checkpoint folder of a MODEL argument: the embedded model, a folder, or a Hub id (cached or downloaded)."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from h1export.checkpoint.lora import check_is_model
from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG

EMBEDDED = "tiny"
SNAPSHOTS = "snapshots"  # the folder of a model in a Hub cache that has one folder a commit
COMMIT = re.compile(r"[0-9a-f]{40}")
CACHED = re.compile(r"models--(?=.)")  # before owner and name in a Hub cache
UNNAMED = "model"  # the name of a model in the root folder
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")  # no code and no pickles


def embedded_model() -> Path:
    """Return the folder of the trained model inside the package."""
    return Path(str(files("h1export") / "assets" / EMBEDDED))


def resolve(model: str | None) -> Path:
    """Return the checkpoint folder of ``model``, a folder or a Hub id; None stands for the embedded model.

    Raises:
        H1ExportError: ``model`` is neither a folder nor a Hub id that is cached or can be downloaded, or is an adapter.
    """
    if model is None:
        return embedded_model()
    folder = resolve_folder(model)
    check_is_model(folder, CONFIG)
    return folder


def resolve_folder(model: str) -> Path:
    """Return the folder of a model or an adapter; ``model`` is a folder or a Hub id.

    Raises:
        H1ExportError: ``model`` is neither a folder nor a Hub id that is cached or can be downloaded.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise H1ExportError(folder, "is a file", "give the checkpoint's folder")
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise H1ExportError(
            folder, "no such folder", "give a checkpoint folder, or a Hub id such as tiiuae/Falcon-H1-0.5B-Instruct"
        )
    return _from_hub(model)


def model_name(folder: Path) -> str:
    """Return the name of the model in ``folder``: the folder's own, or the model's where it is in a Hub cache.

    A cache keeps a model in ``models--OWNER--NAME/snapshots/COMMIT``; links are followed.
    """
    place = folder.resolve()
    if place.parent.name == SNAPSHOTS and (COMMIT.fullmatch(place.name) or CACHED.match(place.parent.parent.name)):
        place = place.parent.parent
    return CACHED.sub("", place.name).rpartition("--")[2] if CACHED.match(place.name) else place.name or UNNAMED


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise H1ExportError(model, f"no such folder, and not a Hub id ({error})", "give a checkpoint folder") from None
    except HfHubHTTPError as error:
        raise H1ExportError(model, f"the Hub refused it ({error})", "check the id, and your access to it") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        what = "no such folder, not in the local Hub cache, and the Hub cannot be reached"
        raise H1ExportError(model, what, "download it where there is a network, or give a folder") from None

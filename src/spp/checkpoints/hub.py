"""Find a model: a local folder, or a download from the hub."""

from __future__ import annotations

from pathlib import Path

from spp.errors import UsageError
from spp.runtime.files import user_path

# What a checkpoint needs, and what says under which licence it is; never pickles, never code that was not asked for.
_HUB_CODE = ["*.py", "*.tiktoken"]
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.model.*",
    "*.txt",
    "*.jinja",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
]


def resolve_model(model: str, *, code: bool = False) -> Path:
    """The folder of a model given as a local folder or as a hub id (downloaded through huggingface_hub).

    Args:
        model: the folder or id.
        code: whether to download Python files as well (`--trust-remote-code`).

    Raises:
        UsageError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    folder = user_path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"model {model!r} is a file; give the folder that holds config.json and the weights")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UsageError(f"model {model!r}: no such folder")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=[*_HUB_FILES, *(_HUB_CODE if code else [])]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UsageError(f"model {model!r}: no such folder, and the hub has no such model") from error
    except Exception as error:  # whatever the network stack raises, the user can do the same thing about it
        raise UsageError(
            f"model {model!r}: no such folder, and the hub cannot be reached ({type(error).__name__}); "
            "give a local folder, or download the model where there is a network"
        ) from error

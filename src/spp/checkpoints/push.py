"""`spp push`: upload a model that spp wrote to the hub, with its card under its name there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from spp.checkpoints.checkpoint import VERIFICATION, Checkpoint
from spp.checkpoints.json_files import read_object
from spp.checkpoints.model_card import CARD, model_card
from spp.checkpoints.options import PushOptions
from spp.errors import SppError, UsageError


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """The result of `push_to_hub`.

    Attributes:
        repo: id of the model on the hub.
        url: URL of the commit.
        card: whether the card was rewritten for this name; an edited card is uploaded as it is.
    """

    repo: str
    url: str
    card: bool


def push_to_hub(options: PushOptions) -> PushReport:
    """Upload a merged or pruned model, or an archive: its files in one commit, then the model card.

    Raises:
        UsageError: there is no model, the hub does not allow the name, or nobody is logged in.
        SppError: the model's files are damaged, its proof failed, or the hub refuses or cannot be reached.
    """
    folder = options.model
    _require_sound(folder)
    try:
        validate_repo_id(options.repo)
    except HFValidationError as error:
        raise UsageError(f"repo {options.repo!r} is no name that the hub allows: {error}") from error
    ours = _card_is_ours(folder)
    api = HfApi()
    try:
        repo = api.create_repo(options.repo, private=options.private, exist_ok=True).repo_id
        # Its own commit, and the last: whoever finds the card finds the model that it is of.
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=[".*", "*/.*", *([CARD] if ours else [])],
            commit_message="Upload a sparse model made with spp",
        )  # fmt: skip
        if ours:
            card = model_card(folder, name=repo).encode()
            commit = api.upload_file(
                path_or_fileobj=card, path_in_repo=CARD, repo_id=repo, commit_message="Add the model's card"
            )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UsageError(
                f"the hub does not let you write to {options.repo} ({status}); log in with `hf auth login`, or set "
                "HF_TOKEN to a token that may write there"
            ) from error
        raise SppError(f"the hub refused {options.repo}: {error}") from error
    except Exception as error:  # whatever the network stack raises, the user can do the same thing about it
        raise SppError(
            f"the hub cannot be reached ({type(error).__name__}: {error}); nothing was changed here, push again later"
        ) from error
    return PushReport(repo=repo, url=commit.commit_url, card=ours)


def _require_sound(folder: Path) -> None:
    """Refuse a model that is damaged, or whose proof failed."""
    if not folder.is_dir():
        raise UsageError(f"model {folder}: no such folder")
    Checkpoint.open(folder)
    if (folder / VERIFICATION).is_file() and not read_object(folder / VERIFICATION).get("verified"):
        raise SppError(f"{folder}: its {VERIFICATION} says that zeros were lost; merge it again")


def _card_is_ours(folder: Path) -> bool:
    """Whether the folder has the card that spp wrote, unchanged."""
    card = folder / CARD
    if not ((folder / VERIFICATION).is_file() and card.is_file()):
        return False
    return card.read_bytes() == model_card(folder).encode()

"""Attach a saved adapter, of SPP or any other PEFT method, to a loaded model."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

import spp.adapters.tuner  # noqa: F401 (makes PEFT know SPP adapters)
from spp.adapters.factors import SETTINGS, read_settings
from spp.checkpoints.fingerprint import base_fingerprint, warn_of_other_base
from spp.errors import SppError, UsageError, brief
from spp.models.pack_model import unpack_


def check_adapter(adapter: Path, model: str, folder: Path) -> None:
    """Refuse a folder without an adapter; warn if an SPP adapter was trained on other weights than the model's.

    Args:
        adapter: the adapter's folder.
        model: the model as the user named it, for messages.
        folder: the model's folder.

    Raises:
        UsageError: there is no adapter in the folder.
    """
    if not (adapter / SETTINGS).is_file():
        raise UsageError(f"adapter {adapter}: no {SETTINGS} there; give the folder that spp train wrote")
    warn_of_other_base(adapter, model, lambda: base_fingerprint(folder))


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Attach a saved adapter to a model.

    Raises:
        SppError: the adapter is damaged, or was made for another model.
    """
    if read_settings(adapter).get("peft_type") != "SPP":
        unpack_(model, model.dtype)  # other methods support neither packed layers nor layers whose dtype is not x's
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # spp merge unties
            adapted = PeftModel.from_pretrained(model, str(adapter))
        # Loaded again, because only this call reports mismatches: PEFT leaves factors that the file lacks at their
        # initial values, and drops those of modules that the model lacks.
        found = adapted.load_adapter(str(adapter), "default")
    except Exception as error:  # PEFT raises whatever its parts do: KeyError, RuntimeError, SafetensorError, ...
        raise SppError(f"adapter {adapter} does not load on this model: {brief(error)}") from error
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise SppError(
            f"adapter {adapter} was made for another model: {len(odd)} of its tensors do not match, e.g. {odd[0]}"
        )
    return adapted

"""Put a saved adapter, of SPP or of any PEFT method, on a model that is loaded."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

import spp.adapters.tuner  # noqa: F401 (makes PEFT know SPP adapters)
from spp.adapters.factors import SETTINGS, read_settings
from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.fingerprint import base_fingerprint, warn_of_other_base
from spp.errors import SppError, UsageError, brief
from spp.models.pack_model import unpack_


def check_adapter(adapter: Path, model: str, folder: Path) -> None:
    """Refuse what is no adapter; warn where ours was trained on other weights than the model's.

    Args:
        adapter: its folder.
        model: what the user calls the model.
        folder: where the model is.
    """
    if not (adapter / SETTINGS).is_file():
        raise UsageError(f"adapter {adapter}: no {SETTINGS} there; give the folder that spp train wrote")
    if (adapter / MANIFEST).is_file():
        warn_of_other_base(adapter, model, base_fingerprint(folder))


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a saved adapter on a model.

    Raises:
        SppError: it is damaged, or was made for another model.
    """
    if read_settings(adapter).get("peft_type") != "SPP":
        unpack_(model, model.dtype)  # other methods know no packed layers, nor layers of another dtype than x
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, str(adapter))
        # Again, because only this call tells what did not match: PEFT leaves factors that the file lacks at their
        # init, and drops those of modules that the model lacks.
        found = adapted.load_adapter(str(adapter), "default")
    except Exception as error:  # PEFT raises whatever its parts do: KeyError, RuntimeError, SafetensorError, ...
        raise SppError(f"adapter {adapter} does not load on this model: {brief(error)}") from error
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise SppError(
            f"adapter {adapter} was made for another model: {len(odd)} of its tensors do not match, e.g. {odd[0]}"
        )
    return adapted

"""SPP as a PEFT tuner. Importing this package registers it with PEFT."""

from spp.adapters.tuner.config import SppConfig
from spp.adapters.tuner.layer import SppLayer, SppLinear
from spp.adapters.tuner.model import SppModel
from spp.adapters.tuner.registration import register

__all__ = ["SppConfig", "SppLayer", "SppLinear", "SppModel"]

register()

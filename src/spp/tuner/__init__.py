"""SPP as a PEFT tuner. Importing this package registers it with PEFT."""

from spp.tuner.config import SppConfig
from spp.tuner.layer import SppLayer, SppLinear
from spp.tuner.model import SppModel
from spp.tuner.registration import register

__all__ = ["SppConfig", "SppLayer", "SppLinear", "SppModel"]

register()

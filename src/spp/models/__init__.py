"""Models in memory: their architecture, loading them, and layers with packed or quantized weights."""

from spp.models.architecture import auto_class

__all__ = ["auto_class"]

"""From a float model to a multi-Boolean one."""

from mbdist.convert.convert import Conversion, LayerReport, bits_per_weight

__all__ = ["Conversion", "LayerReport", "bits_per_weight"]

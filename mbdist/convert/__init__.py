"""From a float model to a multi-Boolean one."""

from mbdist.convert.convert import LayerReport, convert_model

__all__ = ["LayerReport", "convert_model"]

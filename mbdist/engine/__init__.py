"""DeepSpeed, and nothing else imports it: ZeRO holds the float state and, in stage 3, the planes."""

from mbdist.engine.engine import Engine

__all__ = ["Engine"]

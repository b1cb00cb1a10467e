"""What a run needs, before it starts: memory a worker by category, bytes and seconds a step. No weights, no GPU."""

from mbdist.plan.memory import MemoryPlan, plan_memory
from mbdist.plan.model import PlannedModel, planned_model

__all__ = ["MemoryPlan", "PlannedModel", "plan_memory", "planned_model"]

"""A run as one YAML file. Imports neither torch nor deepspeed nor ray."""

from mbdist.config.loading import load_config, parse_config, with_changes, write_config
from mbdist.config.schema import RunConfig

__all__ = ["RunConfig", "load_config", "parse_config", "with_changes", "write_config"]

"""The configuration of a run: its schema, its presets, and how it is read from YAML."""

from ogpsa_jax.config.file import dump_config, load_config
from ogpsa_jax.config.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config"]

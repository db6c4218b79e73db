"""Fine-tuning from a configuration: ``train(load_config("sft.yaml"))``.

Imported when they are used, so that a configuration can be read without loading a trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ogpsa_jax.config import RunConfig, load_config
    from ogpsa_jax.training.hooks import HookError, Hooks
    from ogpsa_jax.training.run import train, train_stages

_MODULES = {
    "HookError": "ogpsa_jax.training.hooks",
    "Hooks": "ogpsa_jax.training.hooks",
    "RunConfig": "ogpsa_jax.config",
    "load_config": "ogpsa_jax.config",
    "train": "ogpsa_jax.training.run",
    "train_stages": "ogpsa_jax.training.run",
}

__all__ = ["HookError", "Hooks", "RunConfig", "load_config", "train", "train_stages"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

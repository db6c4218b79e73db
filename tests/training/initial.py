"""What the tests of the initial model share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ogpsa_jax.config import RunConfig
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.prepare import RunData, model_config, prepare_data, prepare_model
from ogpsa_jax.training.references import prepare_references

Configured = Callable[..., RunConfig]


INITIAL = "references.target=initial"


IN_STEP = ("references.in_step={share: 0.5}", "ogpsa.refresh=null")


OWN = ("references.answers=own", "references.own_answers.max_new_tokens=6")


def with_prompts(path: Path) -> str:
    return f"references.sets=[{{path: {path}, samples: 12}}]"


class Asked:
    """What a run is given of the initial model, and how often that was asked."""

    def __init__(self) -> None:
        self.times = 0

    def references(self, config: RunConfig) -> RunData:
        mesh = make_mesh(config.mesh)

        def model() -> Any:
            self.times += 1
            return prepare_model(config, mesh)

        return prepare_references(config, prepare_data(config, model_config(config)), mesh, model)


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

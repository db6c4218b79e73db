"""The small model of the demonstration, made by the package's own trainer."""

from functools import partial
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.data import TrainBatches
from ogpsa_jax.demo.recipe import Pretraining
from ogpsa_jax.demo.world import World, examples
from ogpsa_jax.models import Decoder
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.loop import Workload, fit
from ogpsa_jax.training.step import Network


def one_device() -> Mesh:
    """The mesh of one device: so small a model gains nothing from more."""
    axes = ("data", "fsdp", "tensor")
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh((1, 1, 1), axes, axis_types=kinds, devices=jax.devices()[:1])


def pretrain(recipe: Pretraining, world: World, mesh: Mesh, run_dir: Path) -> Network:
    """Train a decoder on the world's general tasks and (answered) requests, packed.

    Args:
      recipe: sizes and steps.
      world: what there is to learn; its seed is also that of the weights.
      mesh: the devices.
      run_dir: a finished run there is read back, an interrupted one resumes.
    """
    config = RunConfig.model_validate(
        {
            "ogpsa": {"preset": "off"},
            "model": {"dtype": "float32"},
            "optimizer": {
                "learning_rate": recipe.learning_rate,
                "warmup_steps": recipe.steps // 20,
            },
            "train": {
                "batch_size": recipe.rows,
                "micro_batch_size": recipe.rows,
                "remat": "none",
                "save_every": 250,
                "keep_checkpoints": 1,
                "log_every": 25,
            },
            "output_dir": str(run_dir),
        }
    )
    batches = TrainBatches(
        examples(world.pretraining(recipe.items, world.seed)),
        batch_size=recipe.rows,
        micro_batch_size=recipe.rows,
        max_length=recipe.row_length,
        packing=True,
        seed=world.seed,
        steps=recipe.steps,
    )
    model = Decoder(recipe.model, rngs=nnx.Rngs(world.seed))
    run_dir.mkdir(parents=True, exist_ok=True)
    network, _ = fit(
        Network.of(model),
        Workload(partial(sft_loss, chunk_size=64), batches),
        config,
        mesh,
        run_dir,
    )
    return network

"""Checkpoints by Orbax: parameters, optimizer state with the basis, and the step.

The position in the data and every random choice are functions of (seed, step), so the step is all
that is needed to go on. A checkpoint is complete or invisible; one that cannot be read is passed
over for the one before, and the message says so.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Write the checkpoint of `step` in the background."""
        self._manager.save(
            step,
            args=ocp.args.StandardSave(state),
            force=True,
        )

    def restore_newest(self, like: Any) -> tuple[int, Any] | None:
        """The newest readable checkpoint, in the shapes, dtypes and shardings of `like`.

        Returns:
          (step, state), or None where there is no readable checkpoint.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # whatever a torn file makes the storage layers raise
                logger.warning(
                    "checkpoint %d cannot be read (%s); using the one before", step, error
                )
                self._manager.delete(step)
        return None

    def wait(self) -> None:
        """Block until every save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go."""
        self._manager.wait_until_finished()
        self._manager.close()

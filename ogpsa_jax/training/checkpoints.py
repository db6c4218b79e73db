"""Checkpoints by Orbax: parameters, optimizer state with the basis, and the step.

The position in the data and every random choice are functions of (seed, step), so the step is all
that is needed to go on. A checkpoint is complete or invisible: its last file, a manifest, has the
digest of every other, and none is used whose bytes have changed since. One that is torn or changed
is put aside, never deleted, and the one before is used; one that cannot be read for another reason,
or that contains another model, stops the run.
"""

import contextlib
import errno
import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ogpsa_jax.errors import InputError
from ogpsa_jax.manifest import check_manifest, write_manifest
from ogpsa_jax.training.processes import everywhere

logger = logging.getLogger(__name__)

# Reasons that say nothing about the file, in the words of the system and of the storage library:
# the checkpoint may be read the next time.
_PASSING_ERRNOS = {
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC),
}
# The storage library puts the time of completion into it after the manifest is written.
_TIMES = "_CHECKPOINT_METADATA"
_PASSING_WORDS = (
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"),
    *("CANCELLED", "UNAUTHENTICATED"),
)


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      folder: made where it is missing; what an interrupted save left behind there is removed.
      keep: newest checkpoints kept.
      write: False: only read, while another process may be writing there.
    """

    def __init__(self, folder: Path, keep: int, *, write: bool = True) -> None:
        self._folder = folder.absolute()
        self._keep = keep
        self._write = write
        self._manager = self._open()
        self._saving: int | None = None
        self._hook = sys.unraisablehook
        if write:
            sys.unraisablehook = self._unless_abandoned

    def _unless_abandoned(self, found: Any) -> None:
        """Drop what the writers that a failed save leaves behind say to its closed event loop."""
        if str(found.exc_value) != "Event loop is closed":
            self._hook(found)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=True,
            create=self._write,
            cleanup_tmp_directories=self._write,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            return ocp.CheckpointManager(
                self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self._folder}: a checkpoint's {_TIMES} cannot be read ({_reason(error)}); move "
                "that checkpoint away and run the same command again."
            ) from error

    def _seal(self) -> None:
        """Write the manifest, when all else is written and before the checkpoint gets its name."""
        if jax.process_index() == 0:
            for folder in self._folder.glob(f"{self._saving}.*"):
                write_manifest(folder, {"step": self._saving}, leave_out={_TIMES})

    def save(self, step: int, state: Any) -> None:
        """Write the checkpoint of `step` in the background.

        Raises:
          InputError: this one, or the one before, could not be written.
        """
        with self._storage_errors():
            # Before the state is copied: a failure must name the checkpoint that it struck.
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore_newest(self, like: Any) -> tuple[int, Any] | None:
        """The newest readable checkpoint, in the shapes, dtypes and shardings of `like`.

        The arrays of `like` are deleted where there is a checkpoint to read, so that a run that
        fits into memory can also be resumed there. Torn checkpoints that are newer than the one
        returned are moved to the folder ``<name>-unreadable`` beside this one.

        Returns:
          (step, state), or None where there is no checkpoint.

        Raises:
          InputError: a checkpoint of something else; one that could not be read for a reason that
            may pass (permissions, memory, a file system that does not answer); or all are torn.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        torn: list[int] = []
        for step in steps:
            if not torn:
                jax.tree.map(lambda leaf: leaf.delete(), like)
            found = self._restore(step, abstract)
            if found is not None:
                self._put_aside(torn)
                what = "resuming from" if self._write else "reading"
                logger.info("%s the checkpoint of step %d in %s", what, step, self._folder)
                return step, found
            torn.append(step)
        self._put_aside(torn)
        if torn:
            remedy = "run the same command again to start" if self._write else "train again"
            raise InputError(
                f"{self._folder}: every checkpoint is torn; {remedy} from the beginning."
            )
        return None

    def _restore(self, step: int, abstract: Any) -> Any | None:
        """The state of `step`; None where a file is torn."""
        found = problem = None
        with _quiet():
            try:
                if jax.process_index() == 0:
                    problem = check_manifest(self._folder / str(step), {"step": step})
                if everywhere(problem is None):
                    self._check_fits(step, abstract)
                    found = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except (InputError, AssertionError, TypeError, AttributeError):
                raise
            except Exception as error:  # whatever a torn file makes the storage layers raise
                problem = _reason(error)
                if _may_pass(error):
                    raise InputError(
                        f"{self._folder / str(step)}: the checkpoint cannot be read ({problem}); "
                        "nothing was changed: fix this and run the same command again."
                    ) from error
        if problem is not None:
            logger.warning("the checkpoint of step %d is torn: %s", step, problem)
        return found if everywhere(found is not None) else None

    def _check_fits(self, step: int, abstract: Any) -> None:
        """Tell a checkpoint of another model or optimizer from a torn one."""
        metadata = self._manager.item_metadata(step)
        if metadata is None or metadata.tree is None:
            return
        held, wanted = _outline(metadata.tree), _outline(abstract)
        for name in sorted({*held, *wanted}):
            if held.get(name) != wanted.get(name):
                raise InputError(
                    f"{self._folder / str(step)}: the checkpoint has another model or optimizer "
                    f"({name} is {held.get(name, 'missing')} there and "
                    f"{wanted.get(name, 'missing')} here); choose another output_dir, or continue "
                    "with the version that wrote it."
                )

    def _put_aside(self, steps: list[int]) -> None:
        if not steps or not self._write:
            return
        aside = self._folder.with_name(f"{self._folder.name}-unreadable")
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = [f"{step}", *(f"{step}-{i}" for i in range(2, 1000))]
                target = next(aside / name for name in names if not (aside / name).exists())
                (self._folder / str(step)).rename(target)
                logger.warning("the torn checkpoint of step %d was moved to %s", step, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints put aside")
        self._manager.close()
        self._manager = self._open()

    def wait(self) -> None:
        """Block until every save is complete on disk.

        Raises:
          InputError: one could not be written.
        """
        with self._storage_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go.

        Raises:
          InputError: a save could not be written.
        """
        self.wait()
        self._manager.close()
        sys.unraisablehook = self._hook

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """A failed save in one sentence: its step, the reason, and which checkpoint remains."""
        try:
            yield
        except (OSError, ValueError) as error:
            gc.collect()
            sys.unraisablehook = self._hook
            self._manager.reload()
            whole = max(self._manager.all_steps(), default=None)
            rest = f"step {whole} is whole" if whole is not None else "there is none before it"
            raise InputError(
                f"{self._folder}: the checkpoint of step {self._saving} could not be written "
                f"({_reason(error)}); {rest}: make room and run the same command again."
            ) from error


def _outline(tree: Any) -> dict[str, str]:
    """What each array of a tree of arrays, or of their metadata, is: name -> dtype[shape]."""
    flat = ocp.tree.to_flat_dict(tree, keep_empty_nodes=False)
    return {
        ".".join(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in flat.items()
    }


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _may_pass(error: BaseException) -> bool:
    """Whether the error lies in the circumstances rather than in the file."""
    return any(
        isinstance(link, MemoryError)
        or (isinstance(link, OSError) and link.errno in _PASSING_ERRNOS)
        or any(word in str(link) for word in _PASSING_WORDS)
        for link in _chain(error)
    )


def _reason(error: BaseException) -> str:
    """The innermost cause, short: storage errors carry paths and pages of specification."""
    links = list(_chain(error))
    inner = next((link for link in links if isinstance(link, OSError) and link.strerror), None)
    if inner is not None:
        return str(inner.strerror)
    text = (str(links[-1]).splitlines() or [""])[0].partition(" [")[0].strip()
    if text.split(":")[0].isupper():  # a storage status: its last part is the system's own word
        text = text.rpartition(": ")[2]
    return text[:200] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep quiet about the readers that a failed restore leaves behind.

    They fail too, one by one, when they are collected; nobody awaits them, so that Python would
    print a traceback for each.
    """
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except BaseException:
        gc.collect()
        raise
    else:
        gc.collect()
    finally:
        sys.unraisablehook = before

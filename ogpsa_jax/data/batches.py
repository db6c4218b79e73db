"""Batches by step: packed, shuffled anew each epoch, resumable at once.

The batch of a step is a function of (data, settings, step) alone, so the position in the data is
the step, and neither the number of processes (each makes the whole batch, and puts its devices'
rows on them) nor an interruption changes what is seen.
"""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice

import grain
import numpy as np

from ogpsa_jax.data.examples import Example, Tokens
from ogpsa_jax.progress import quick_bar

Batch = dict[str, np.ndarray]
_OPEN_ROWS = 64  # rows that packing tries to fill at a time


class TrainBatches:
    """The training data of a run; see :meth:`batch`."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        micro_batch_size: int,
        max_length: int,
        packing: bool,
        seed: int,
        epochs: float = 1.0,
        steps: int | None = None,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        """Lay out every row of the run.

        Args:
          examples: all of the same kind, none longer than `max_length`.
          batch_size: rows a step, over all processes.
          micro_batch_size: rows a micro-batch, over all processes; divides `batch_size`.
          max_length: tokens a row may have.
          packing: several documents a row (single sequences only).
          seed: of the order.
          epochs: passes over the data.
          steps: optimizer steps; overrides `epochs`.
          weights: of the sources, in the order in which they were prepared. All 1: an epoch is each
            example once. Otherwise they are the proportions of examples, exact to within one at
            every point of the run (0.8 and 0.2: every fifth is of the second source); an epoch is
            one pass over the first source, the others start again when they are exhausted.

        Raises:
          ValueError: sizes that do not divide, weights that do not fit, pairs to be packed.
        """
        if batch_size % micro_batch_size:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of micro_batch_size "
                f"({micro_batch_size})"
            )
        if packing and len(examples[0].sequences) > 1:
            raise ValueError("packing must be False for pairs")
        longest = max(example.length for example in examples)
        if longest > max_length:
            raise ValueError(f"max_length is {max_length}, but an example has {longest} tokens")
        self._examples = examples
        self._shape = (batch_size // micro_batch_size, micro_batch_size)
        order = _order(examples, weights, seed, epochs if steps is None else None)
        if packing:
            self.length = max_length
            rows = _packed(order, examples, max_length)
        else:
            self.length = _rounded(longest, max_length)
            rows = ([index] for index in order)
        self._rows = list(rows if steps is None else islice(rows, steps * batch_size))
        self._steps = -(-len(self._rows) // batch_size)

    def __len__(self) -> int:
        """Optimizer steps in total."""
        return self._steps

    def batch(self, step: int) -> Batch:
        """The batch of a 0-based step.

        Returns:
          Arrays ``[micro-batches, rows, T]`` or, for pairs, ``[micro-batches, rows, 2, T]``. A last
          batch that lacks rows is filled up with empty ones, which weigh nothing.

        Raises:
          IndexError: no such step.
        """
        if not 0 <= step < self._steps:
            raise IndexError(f"step must lie between 0 and {self._steps - 1}, found {step}")
        count, rows = self._shape
        first = step * count * rows
        chosen = self._rows[first : first + count * rows]
        chosen += [[]] * (count * rows - len(chosen))
        documents = [[self._examples[i] for i in row] for row in chosen]
        arrays = _stacked(documents, self.length, like=self._examples[0])
        return {
            name: array.reshape(count, rows, *array.shape[1:]) for name, array in arrays.items()
        }


def fixed_batches(
    examples: Sequence[Example], *, batch_size: int, max_length: int, multiple: int = 1
) -> Batch:
    """All examples in order, stacked as ``[batches, rows, ...]``; the last batch is filled up.

    Args:
      examples: all of the same kind.
      batch_size: rows a batch.
      max_length: tokens a row may have; rows are as long as the longest example needs.
      multiple: rows are added until `multiple` divides them, so that they can be sharded.
    """
    batch_size = min(batch_size, len(examples))
    rows = -(-batch_size // multiple) * multiple
    count = -(-len(examples) // batch_size)
    length = _rounded(max(example.length for example in examples), max_length)
    filled: list[list[Example]] = []
    for first in range(0, len(examples), batch_size):
        batch = [[example] for example in examples[first : first + batch_size]]
        filled += batch + [[]] * (rows - len(batch))
    arrays = _stacked(filled, length, like=examples[0])
    return {name: array.reshape(count, rows, *array.shape[1:]) for name, array in arrays.items()}


def _stacked(rows: Sequence[Sequence[Example]], length: int, like: Example) -> Batch:
    """Arrays of rows, each holding any number of documents one after the other.

    Args:
      rows: perhaps all of them empty.
      length: tokens a row.
      like: says what the arrays are where the rows are empty.

    Returns:
      ``input_ids``, ``segment_ids`` (0: padding), ``positions`` (from 0 in each document) int32 and
      ``loss_mask`` bool, ``[rows, length]``, or ``[rows, 2, length]`` for pairs, with
      ``reference_logps`` float32 ``[rows, 2]`` where the examples have them; where they have a
      teacher, ``teacher_ids`` int32 and ``teacher_log_probs`` float32 ``[rows, length, k]`` and
      ``teacher_rest`` float32 ``[rows, length]``.
    """
    width = len(like.sequences)
    shape = (len(rows), width, length)
    batch: Batch = {
        "input_ids": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }
    for i, row in enumerate(rows):
        for side in range(width):
            _fill(batch, (i, side), [example.sequences[side] for example in row])
    if width == 1:
        batch = {name: array[:, 0] for name, array in batch.items()}
    if like.reference_logps is not None:
        known = [row[0].reference_logps if row else (0.0, 0.0) for row in rows]
        batch["reference_logps"] = np.asarray(known, np.float32)
    if like.teacher is not None:
        batch |= _teachers(rows, length, like.teacher.ids.shape[1])
    return batch


def _teachers(rows: Sequence[Sequence[Example]], length: int, kept: int) -> Batch:
    """Predictions of teachers, each at the position before the token that it is of."""
    batch: Batch = {
        "teacher_ids": np.zeros((len(rows), length, kept), np.int32),
        "teacher_log_probs": np.zeros((len(rows), length, kept), np.float32),
        "teacher_rest": np.zeros((len(rows), length), np.float32),
    }
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            [tokens], teacher = example.sequences, example.teacher
            if teacher is not None:
                at = start + np.flatnonzero(tokens.loss_mask[1:])
                batch["teacher_ids"][i, at] = teacher.ids
                batch["teacher_log_probs"][i, at] = teacher.log_probs
                batch["teacher_rest"][i, at] = teacher.rest
            start += len(tokens.ids)
    return batch


def _fill(batch: Batch, place: tuple[int, int], documents: list[Tokens]) -> None:
    at = 0
    for number, tokens in enumerate(documents, start=1):
        stop = at + len(tokens.ids)
        batch["input_ids"][place][at:stop] = tokens.ids
        batch["loss_mask"][place][at:stop] = tokens.loss_mask
        batch["segment_ids"][place][at:stop] = number
        batch["positions"][place][at:stop] = np.arange(len(tokens.ids))
        at = stop


def _rounded(length: int, max_length: int) -> int:
    """One static row length: the longest example's, rounded up for the accelerator's tiles."""
    return min(max_length, -(-length // 64) * 64)


def _order(
    examples: Sequence[Example], weights: Sequence[float], seed: int, epochs: float | None
) -> Iterator[int]:
    """Indices of examples in the order in which they are seen; without end if `epochs` is None."""
    if len(weights) <= max(example.source for example in examples) or min(weights) <= 0:
        raise ValueError(f"weights must hold a positive number for each source, found {weights}")
    members: list[list[int]] = [[] for _ in weights]
    for index, example in enumerate(examples):
        members[example.source].append(index)
    if all(weight == 1 for weight in weights):
        members, weights = [[index for indices in members for index in indices]], [1.0]
    streams = [
        grain.MapDataset.source(indices).shuffle(seed=seed + number).repeat()
        for number, indices in enumerate(members)
    ]
    taken = [0] * len(weights)
    # In fractions, because the exact comparison below must not hang on a rounding error.
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = None if epochs is None else round(epochs * len(members[0]) / float(shares[0]))
    bar = quick_bar("laying out the run", total or 0, "rows")
    for count in range(1, total + 1) if total is not None else itertools.count(1):
        if total is not None:
            bar.at(count)
        number = _next_source(shares, [share * count for share in shares], taken)
        yield int(streams[number][taken[number]])
        taken[number] += 1


def _next_source(shares: Sequence[Fraction], due: Sequence[Fraction], taken: Sequence[int]) -> int:
    """Which source the next row is of, so that none is ever a row ahead of its share or behind it.

    Of the sources that are far enough behind, the one that would first be too far (the assignment
    of Tijdeman, The chairman assignment problem, 1980).
    """
    if len(shares) == 1:
        return 0
    slack = 1 - Fraction(1, 2 * len(shares) - 2)
    behind = [share - have for share, have in zip(due, taken, strict=True)]
    waits = {
        number: (slack - late) / shares[number]
        for number, late in enumerate(behind)
        if late >= 1 - slack
    }
    return min(waits, key=waits.__getitem__)


def _packed(
    order: Iterator[int], examples: Sequence[Example], max_length: int
) -> Iterator[list[int]]:
    """First fit into a few open rows; the fullest is closed when none has room.

    (The packers of grain are iterators: a step could only be reached through all before it.)
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        need = examples[index].length
        fits = next((i for i, left in enumerate(room) if left >= need), None)
        if fits is None:
            if len(rows) == _OPEN_ROWS:
                fullest = room.index(min(room))
                yield rows.pop(fullest)
                room.pop(fullest)
            rows.append([])
            room.append(max_length)
            fits = len(rows) - 1
        rows[fits].append(index)
        room[fits] -= need
    yield from rows

"""Batches by step: packed, shuffled again each epoch, resumable at any step.

The batch of a step is a function of (data, settings, step) alone, so the position in the data is
the step, and neither the number of processes (each makes the whole batch, and puts its devices'
rows on them) nor an interruption changes what is seen. It is found by arithmetic: the mixture says
which source a row is of and how many of its rows came before, and a permutation drawn from (seed,
source, epoch) says which of the source's rows that is.
"""

import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ogpsa_jax.data.examples import Example, Tokens
from ogpsa_jax.progress import quick_bar

HostBatch = dict[str, np.ndarray]
_OPEN_ROWS = 64  # rows that packing tries to fill at a time
_LONGEST_PERIOD = 100_000  # rows after which the sources of a mixture follow each other as before


class TrainBatches:
    """The training data of a run; see :meth:`batch`.

    Attributes:
      rows: of the whole run.
      length: tokens a row.
    """

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
        """Pack the examples, and find out how many rows the run has.

        Args:
          examples: all of the same kind, none longer than `max_length`.
          batch_size: rows a step, over all processes.
          micro_batch_size: rows a micro-batch, over all processes; divides `batch_size`.
          max_length: tokens a row may have.
          packing: several documents of a source in one row (single sequences only); the same
            ones in every epoch.
          seed: of the order.
          epochs: passes over the data.
          steps: optimizer steps; overrides `epochs`.
          weights: of the sources, in the order in which they were prepared. All 1: an epoch is each
            example once. Otherwise they are the proportions of examples, exact to within one row at
            every point of the run (0.8 and 0.2: every fifth is of the second source); an epoch is
            one pass over the first source, the others start again when they are exhausted.
            Proportions with more than five digits are rounded to five.

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
        self.length = max_length if packing else _rounded(longest, max_length)
        members = _by_source(examples, weights)
        self._sources = [
            _Source(examples, indices, max_length if packing else None, (seed, number))
            for number, indices in enumerate(members)
        ]
        rows_per_example = [
            Fraction(len(source), len(indices))
            for source, indices in zip(self._sources, members, strict=True)
        ]
        self._mixture = _Mixture(weights if len(members) > 1 else [1.0], rows_per_example)
        if steps is None:
            first = Fraction(self._mixture.period, self._mixture.counts[0])
            self.rows = round(Fraction(epochs) * len(self._sources[0]) * first)
        else:
            self.rows = steps * batch_size
        self._steps = -(-self.rows // batch_size)

    def __len__(self) -> int:
        """Optimizer steps in total."""
        return self._steps

    def batch(self, step: int) -> HostBatch:
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
        documents = [
            [self._examples[i] for i in self._row(position)] if position < self.rows else []
            for position in range(first, first + count * rows)
        ]
        arrays = _stacked(documents, self.length, like=self._examples[0])
        return {
            name: array.reshape(count, rows, *array.shape[1:]) for name, array in arrays.items()
        }

    def _row(self, position: int) -> Sequence[int]:
        """The examples of the run's row at a position."""
        number, place = self._mixture.at(position)
        return self._sources[number].at(place)


class _Source:
    """The rows of one source, in an order that is drawn again each time they are exhausted.

    Args:
      examples: of all sources.
      members: which of them are of this one.
      max_length: tokens of a packed row; None: a row is one example.
      seed: of the orders.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        members: np.ndarray,
        max_length: int | None,
        seed: tuple[int, ...],
    ) -> None:
        self._rows: Sequence[Sequence[int]] | np.ndarray = members[:, None]
        if max_length is not None:
            shuffled = members[_permutation(len(members), seed)]
            self._rows = _packed(shuffled, examples, max_length)
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: _permutation(len(self._rows), (*seed, epoch))
        )

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, position: int) -> Sequence[int]:
        """The examples of the row at a position, which counts on through all epochs."""
        epoch, place = divmod(position, len(self._rows))
        return self._rows[self._order(epoch)[place]]


class _Mixture:
    """Which source each row is of, so that none is ever a row ahead of its share or behind it.

    Shares are whole numbers of rows in a period, so the period says it all.

    Args:
      weights: of the sources, in examples.
      rows_per_example: of each source.

    Attributes:
      counts: rows of each source in a period.
      period: their sum.
    """

    def __init__(self, weights: Sequence[float], rows_per_example: Sequence[Fraction]) -> None:
        self.counts = _whole_numbers(
            [
                Fraction(weight).limit_denominator(10**6) * rows
                for weight, rows in zip(weights, rows_per_example, strict=True)
            ]
        )
        self.period = sum(self.counts)
        self._source = _one_period(self.counts)
        self._before = np.empty(self.period, np.int64)
        for number, count in enumerate(self.counts):
            self._before[self._source == number] = np.arange(count)

    def at(self, position: int) -> tuple[int, int]:
        """The source of the row at a position, and how many of its rows come before."""
        periods, place = divmod(position, self.period)
        number = int(self._source[place])
        return number, periods * self.counts[number] + int(self._before[place])


def fixed_batches(
    examples: Sequence[Example], *, batch_size: int, max_length: int, multiple: int = 1
) -> HostBatch:
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


def _stacked(rows: Sequence[Sequence[Example]], length: int, like: Example) -> HostBatch:
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
    batch: HostBatch = {
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


def _teachers(rows: Sequence[Sequence[Example]], length: int, kept: int) -> HostBatch:
    """Predictions of teachers, each at the position before the token that it is of."""
    batch: HostBatch = {
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


def _fill(batch: HostBatch, place: tuple[int, int], documents: list[Tokens]) -> None:
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


def _by_source(examples: Sequence[Example], weights: Sequence[float]) -> list[np.ndarray]:
    """The indices of each source's examples; of all as one source where all weights are 1."""
    sources = np.asarray([example.source for example in examples])
    if len(weights) <= sources.max() or min(weights) <= 0:
        raise ValueError(f"weights must contain a positive number for each source, found {weights}")
    if all(weight == 1 for weight in weights):
        return [np.arange(len(examples))]
    members = [np.flatnonzero(sources == number) for number in range(len(weights))]
    if not all(map(len, members)):
        raise ValueError(f"weights has {len(weights)} entries, but some source has no example")
    return members


def _permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    """A random order, from a stream of bits that numpy promises never to change."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


def _whole_numbers(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in these proportions, to five digits where they would be large."""
    unit = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * unit) for weight in weights]
    divisor = math.gcd(*counts)
    if min(counts) == 0 or sum(counts) // divisor > _LONGEST_PERIOD:
        total = sum(weights)
        counts = [max(1, round(weight / total * _LONGEST_PERIOD)) for weight in weights]
        divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


def _one_period(counts: Sequence[int]) -> np.ndarray:
    """The source of each row of a period that contains `counts` rows of the sources.

    No source is ever ahead of its share or behind it by more than 1 - 1 / (2 n - 2) rows, n being
    the number of sources. An order that keeps to it exists (Tijdeman, The chairman assignment
    problem, 1980), and taking the most urgent row of those that may come finds it.
    """
    period, parts = sum(counts), 2 * len(counts) - 2
    if len(counts) == 1:
        return np.zeros(period, np.int64)
    windows = sorted(  # the places at which the k-th row of a source may come, first and last
        (
            -(-(k * parts + 1) * period // (count * parts)) - 1,
            (k * parts + parts - 1) * period // (count * parts),
            number,
        )
        for number, count in enumerate(counts)
        for k in range(count)
    )
    waiting: list[tuple[int, int]] = []
    sources = np.empty(period, np.int64)
    entered = 0
    for place in range(period):
        while entered < period and windows[entered][0] <= place:
            heapq.heappush(waiting, windows[entered][1:])
            entered += 1
        sources[place] = heapq.heappop(waiting)[1]
    return sources


def _packed(
    order: Sequence[int] | np.ndarray, examples: Sequence[Example], max_length: int
) -> list[list[int]]:
    """First fit into a few open rows; the fullest is closed when none has room."""
    closed: list[list[int]] = []
    rows: list[list[int]] = []
    room: list[int] = []
    bar = quick_bar("packing", len(order), "examples")
    for index in map(int, order):
        bar.more(1)
        need = examples[index].length
        fits = next((i for i, left in enumerate(room) if left >= need), None)
        if fits is None:
            if len(rows) == _OPEN_ROWS:
                fullest = room.index(min(room))
                closed.append(rows.pop(fullest))
                room.pop(fullest)
            rows.append([])
            room.append(max_length)
            fits = len(rows) - 1
        rows[fits].append(index)
        room[fits] -= need
    return closed + rows

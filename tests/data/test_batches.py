"""The batch of a step depends on the data, the settings and the step, and on nothing else."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ogpsa_jax.data import Example, Tokens, TrainBatches, fixed_batches


def examples_of(
    lengths: Sequence[int], *, sources: Sequence[int] | None = None, width: int = 1
) -> list[Example]:
    """Example i consists of tokens i + 1; its first token is not trained on."""
    return [
        Example(
            tuple(
                Tokens(
                    np.full(max(2, length - side), i + 1, np.int32),
                    np.arange(max(2, length - side)) > 0,
                )
                for side in range(width)
            ),
            0 if sources is None else sources[i],
        )
        for i, length in enumerate(lengths)
    ]


def random_lengths(rng: random.Random, count: int, longest: int) -> list[int]:
    return [rng.randint(2, longest) for _ in range(count)]


def documents(batch: dict[str, np.ndarray]) -> list[int]:
    """The example of every document, in the order of the rows; checks each document's layout."""
    found = []
    ids, segments = batch["input_ids"], batch["segment_ids"]
    length = ids.shape[-1]
    for row, segment, position, mask in zip(
        ids.reshape(-1, length),
        segments.reshape(-1, length),
        batch["positions"].reshape(-1, length),
        batch["loss_mask"].reshape(-1, length),
        strict=True,
    ):
        used = int((segment > 0).sum())
        assert (segment[:used] > 0).all()
        assert (np.diff(segment[:used]) >= 0).all()
        for number in range(1, segment.max(initial=0) + 1):
            here = segment == number
            assert len(set(row[here].tolist())) == 1
            assert position[here].tolist() == list(range(int(here.sum())))
            assert mask[here].tolist() == [i > 0 for i in range(int(here.sum()))]
            found.append(int(row[here][0]) - 1)
        assert not mask[used:].any()
        assert not row[used:].any()
    return found


def batches_of(examples: Sequence[Example], **settings: Any) -> TrainBatches:
    """Batches of eight rows, not packed, unless told otherwise."""
    plain = {"batch_size": 8, "micro_batch_size": 8, "packing": False}
    return TrainBatches(examples, **(plain | settings))


def run(examples: Sequence[Example], **settings: Any) -> list[int]:
    batches = batches_of(examples, **settings)
    return [i for step in range(len(batches)) for i in documents(batches.batch(step))]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_example_once(packing: bool, rng: random.Random) -> None:
    examples = examples_of(random_lengths(rng, 103, 20))
    settings = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 32,
        "packing": packing,
        "seed": rng.randrange(2**31),
    }
    once = run(examples, **settings)
    assert sorted(once) == list(range(103))
    assert once != list(range(103))
    thrice = run(examples, epochs=3, **settings)
    assert Counter(thrice) == Counter(dict.fromkeys(range(103), 3))
    assert run(examples, **settings) == once
    assert run(examples, **{**settings, "seed": settings["seed"] + 1}) != once


def test_each_epoch_has_an_order_of_its_own(rng: random.Random) -> None:
    examples = examples_of([4] * 64)
    order = run(
        examples,
        max_length=8,
        seed=rng.randrange(2**31),
        epochs=3,
    )
    epochs = [order[i : i + 64] for i in (0, 64, 128)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_size_of_the_micro_batches_does_not_change_a_step(rng: random.Random) -> None:
    examples = examples_of(random_lengths(rng, 50, 20))
    seed = rng.randrange(2**31)
    seen = [
        [documents(batches.batch(step)) for step in range(len(batches))]
        for batches in (
            batches_of(
                examples,
                batch_size=16,
                micro_batch_size=size,
                max_length=32,
                packing=True,
                seed=seed,
            )
            for size in (2, 4, 16)
        )
    ]
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("packing", [False, True])
def test_any_step_can_be_asked_for_first(packing: bool, rng: random.Random) -> None:
    examples = examples_of(random_lengths(rng, 40, 20))
    settings = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 32,
        "packing": packing,
        "seed": rng.randrange(2**31),
        "steps": 9,
    }
    batches = batches_of(examples, **settings)
    inorder = [batches.batch(step) for step in range(len(batches))]
    assert len(batches) == 9
    for step in rng.sample(range(9), 9):
        resumed = batches_of(examples, **settings).batch(step)
        for name, array in inorder[step].items():
            np.testing.assert_array_equal(resumed[name], array)
    longer = batches_of(examples, **{**settings, "steps": 12})
    np.testing.assert_array_equal(longer.batch(8)["input_ids"], inorder[8]["input_ids"])


def test_shapes_never_change_and_the_last_batch_is_filled_with_nothing(rng: random.Random) -> None:
    examples = examples_of(random_lengths(rng, 13, 70))
    batches = batches_of(
        examples, batch_size=8, micro_batch_size=2, max_length=512, packing=False, seed=0
    )
    found = [batches.batch(step) for step in range(len(batches))]
    length = -(-max(example.length for example in examples) // 64) * 64
    assert [batch["input_ids"].shape for batch in found] == [(4, 2, length)] * 2
    assert [batch["input_ids"].dtype for batch in found] == [np.int32] * 2
    rows = found[1]["segment_ids"].reshape(8, length)
    assert (rows.any(axis=1)).tolist() == [True] * 5 + [False] * 3


def test_packing_fills_the_rows(rng: random.Random) -> None:
    examples = examples_of(random_lengths(rng, 2000, 256))
    batches = batches_of(
        examples, batch_size=16, micro_batch_size=16, max_length=512, packing=True, seed=0
    )
    tokens = sum(example.length for example in examples)
    rows = sum(
        int(batches.batch(step)["segment_ids"].any(axis=-1).sum()) for step in range(len(batches))
    )
    # No packer needs fewer than tokens / 512 rows; unpacked they would be 2000.
    assert rows <= 1.05 * tokens / 512 + 2


def test_default_weights_take_each_row_of_each_source_once(rng: random.Random) -> None:
    examples = examples_of([4] * 90, sources=[0] * 60 + [1] * 30)
    order = run(
        examples,
        max_length=8,
        seed=rng.randrange(2**31),
        weights=[1.0, 1.0],
    )
    assert sorted(order) == list(range(90))
    halves = [sum(i >= 60 for i in order[:45]), sum(i >= 60 for i in order[45:])]
    assert min(halves) > 0  # mixed, not one after the other


@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.5, 0.5), (1.0, 0.25), (0.3, 0.5, 0.2)])
def test_proportions_are_exact_at_every_point(
    weights: tuple[float, ...], rng: random.Random
) -> None:
    sizes = [100, 7, 31][: len(weights)]
    sources = [number for number, size in enumerate(sizes) for _ in range(size)]
    examples = examples_of([4] * len(sources), sources=sources)
    order = run(
        examples,
        max_length=8,
        seed=rng.randrange(2**31),
        weights=weights,
    )
    shares = np.asarray(weights) / sum(weights)
    counts = np.cumsum([np.eye(len(weights))[sources[i]] for i in order], axis=0)
    ideal = np.arange(1, len(order) + 1)[:, None] * shares
    assert np.abs(counts - ideal).max() < 1.0
    first = Counter(i for i in order if sources[i] == 0)
    assert first == Counter(range(100))  # an epoch is one pass over the first source
    for number in range(1, len(weights)):
        seen = Counter(i for i in order if sources[i] == number).values()
        assert max(seen) - min(seen) <= 1  # the others start again only when they are exhausted


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_of_any_length_starts_at_once_and_reaches_its_last_step(
    packing: bool, rng: random.Random
) -> None:
    """A layout of all rows would be of 10^15 here."""
    examples = examples_of(random_lengths(rng, 50, 20), sources=[0] * 40 + [1] * 10)
    batches = batches_of(
        examples,
        max_length=32,
        packing=packing,
        seed=rng.randrange(2**31),
        epochs=10.0**13,
        weights=[0.7, 0.3],
    )
    last = len(batches) - 1
    assert len(batches) > 10**12
    assert documents(batches.batch(last)) == documents(batches.batch(last))
    assert documents(batches.batch(last)) != documents(batches.batch(0))


def test_packing_keeps_the_proportions_of_examples(rng: random.Random) -> None:
    """Rows hold more of a source's examples where these are short; the shares are of examples."""
    examples = examples_of([4] * 300 + [15] * 200, sources=[0] * 300 + [1] * 200)
    order = run(
        examples,
        max_length=32,
        packing=True,
        seed=rng.randrange(2**31),
        epochs=4,
        weights=[0.6, 0.4],
    )
    counts = Counter(i < 300 for i in order)
    assert {order.count(i) for i in range(300)} == {4}  # an epoch is one pass over the first source
    # The last batch may end within a row's share of the other source: a row holds two of it.
    assert abs(counts[True] - 0.6 * len(order)) <= 8


def test_an_order_is_the_same_in_every_version() -> None:
    """A resumed run goes on in the order that it began with, whatever numpy is there by then."""
    order = run(
        examples_of([4] * 10),
        **{"batch_size": 5, "micro_batch_size": 5, "max_length": 8, "packing": False},
        **{"seed": 7, "epochs": 2},
    )
    assert order[:10] == [8, 4, 3, 6, 2, 1, 0, 5, 9, 7]
    assert order[10:] == [3, 6, 5, 0, 1, 4, 9, 2, 7, 8]


def test_there_is_no_batch_beyond_the_last_step() -> None:
    batches = batches_of(
        examples_of([4] * 5),
        batch_size=2,
        micro_batch_size=2,
        max_length=8,
        seed=0,
    )
    assert len(batches) == 3
    for step in (-1, 3):
        with pytest.raises(IndexError, match=f"between 0 and 2, found {step}"):
            batches.batch(step)


def test_pairs_keep_both_answers_and_their_reference_log_probabilities(
    rng: random.Random,
) -> None:
    plain = examples_of(random_lengths(rng, 5, 20), width=2)
    examples = [
        Example(e.sequences, 0, reference_logps=(-float(i), -2.0 * i)) for i, e in enumerate(plain)
    ]
    batches = batches_of(
        examples, batch_size=4, micro_batch_size=2, max_length=32, packing=False, seed=1, epochs=1
    )
    for step in range(2):
        batch = batches.batch(step)
        assert batch["input_ids"].shape == (2, 2, 2, 32)
        assert batch["reference_logps"].shape == (2, 2, 2)
        assert batch["reference_logps"].dtype == np.float32
        for micro in range(2):
            for row in range(2):
                ids = batch["input_ids"][micro, row]
                number = int(ids[0, 0]) - 1
                expected = (-number, -2 * number) if number >= 0 else (0, 0)
                assert batch["reference_logps"][micro, row].tolist() == list(expected)
                assert ids[0, 0] == ids[1, 0]


def test_fixed_batches_hold_all_rows_in_order(rng: random.Random) -> None:
    count = rng.randint(1, 30)
    examples = examples_of(random_lengths(rng, count, 20))
    batch = fixed_batches(examples, batch_size=6, max_length=32, multiple=4)
    assert batch["input_ids"].shape == (-(-count // 6), 8 if count > 4 else 4, 32)
    assert documents(batch) == list(range(count))
    assert (batch["segment_ids"].any(axis=-1).sum(axis=1) <= 6).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 6}, "batch_size"),
        ({"max_length": 4}, "max_length is 4, but an example has 5 tokens"),
        ({"weights": [1.0, -1.0]}, "weights"),
        ({"weights": [1.0]}, "weights"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    examples = examples_of([5, 5], sources=[0, 1])
    possible = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 8,
        "packing": False,
        "seed": 0,
        "weights": [1.0, 1.0],
    }
    with pytest.raises(ValueError, match=says):
        batches_of(examples, **{**possible, **settings})


def test_pairs_are_not_packed() -> None:
    with pytest.raises(ValueError, match="packing must be False for pairs"):
        batches_of(
            examples_of([5], width=2),
            batch_size=1,
            micro_batch_size=1,
            max_length=8,
            packing=True,
            seed=0,
        )


@pytest.mark.parametrize(
    "weights", [None, [17.14, 18.4, 1.6, 0.33, 0.29, 0.27, 17.15, 0.19, 0.25, 1.63, 21.46, 1.62]]
)
def test_no_source_is_ever_a_row_ahead_or_behind(
    weights: list[float] | None, rng: random.Random
) -> None:
    weights = weights or [10 ** rng.uniform(-1, 2) for _ in range(rng.randint(2, 12))]
    count = len(weights)
    sources = [i for i in range(count) for _ in range(3)]
    batches = batches_of(
        examples_of([4] * len(sources), sources=sources),
        **{"batch_size": 500, "micro_batch_size": 500, "max_length": 8, "packing": False},
        **{"seed": 0, "steps": 1, "weights": weights},
    )
    seen = np.asarray(sources)[batches.batch(0)["input_ids"][0, :, 0] - 1]
    taken = np.cumsum(np.eye(count)[seen], axis=0)
    due = np.arange(1, 501)[:, None] * np.asarray(weights) / sum(weights)
    assert np.abs(taken - due).max() < 1

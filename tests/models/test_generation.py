"""Packed rows are separate rows, generation is transformers', sampling follows its distribution."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType
from transformers import AutoTokenizer

from ogpsa_jax.models import generate, load_pretrained

from .conftest import SMALL, load_torch, relative_error

# As in test_parity: float32 roundings in the largest sums stay below this.
TOLERANCE = 1e-5


def draw_prompts(rng: np.random.Generator, lengths: list[int], vocab: int) -> list[list[int]]:
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def torch_greedy(
    folder: Path, prompts: list[list[int]], count: int, stops: list[int]
) -> list[list[int]]:
    """What transformers adds to prompts padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = load_torch(folder).generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=stops,
    )
    added = []
    for row in rows[:, length:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        added.append(row[: ends[0] + 1] if ends else row)
    return added


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_equal_those_of_transformers(
    family: str, make_checkpoint: Callable[..., Path], rng: np.random.Generator
) -> None:
    folder = make_checkpoint(family, **SMALL)
    model = load_pretrained(folder, dtype="float32")
    prompts = draw_prompts(rng, [1, 7, 12, 3], model.config.vocab_size)
    unstopped = generate(model, prompts, max_new_tokens=16, stop_tokens=[2])
    assert unstopped == torch_greedy(folder, prompts, 16, [2])
    # A token that the first row reaches half-way, so that rows end at different times.
    stop = unstopped[0][len(unstopped[0]) // 2]
    stopped = generate(model, prompts, max_new_tokens=16, stop_tokens=[stop])
    assert stopped == torch_greedy(folder, prompts, 16, [stop])
    assert stopped[0][-1] == stop
    assert len(stopped[0]) <= len(unstopped[0]) // 2 + 1


def test_padding_on_either_side_lists_and_meshes_give_the_same_tokens(
    small: Path, rng: np.random.Generator
) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model = load_pretrained(small, dtype="float32")
    prompts = draw_prompts(rng, [5, 9, 2], model.config.vocab_size)
    expected = generate(model, prompts, max_new_tokens=8)
    assert [len(row) for row in expected] != [0, 0, 0]
    for left in (True, False):
        array, mask = np.full((3, 9), 1), np.zeros((3, 9), int)
        for i, prompt in enumerate(prompts):
            where = slice(9 - len(prompt), 9) if left else slice(len(prompt))
            array[i, where], mask[i, where] = prompt, 1
        assert generate(model, array, attention_mask=mask, max_new_tokens=8) == expected
    # Three rows on four row shards.
    sharded = load_pretrained(small, dtype="float32", mesh=mesh)
    assert generate(sharded, prompts, max_new_tokens=8) == expected


def test_the_models_own_stop_tokens_end_a_row(
    small: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = load_pretrained(small, dtype="float32")
    prompt = draw_prompts(rng, [6], model.config.vocab_size)
    unstopped = generate(model, prompt, max_new_tokens=8, stop_tokens=[])[0]
    assert len(unstopped) == 8
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [1, {unstopped[4]}]}}')
    model = load_pretrained(tmp_path, dtype="float32")
    end = next(i for i, t in enumerate(unstopped) if t in (1, unstopped[4]))
    assert generate(model, prompt, max_new_tokens=8)[0] == unstopped[: end + 1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampled_tokens_follow_the_filtered_distribution(
    options: dict[str, Any], small: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small, dtype="float32")
    # A prompt is drawn anew where a token lies on the edge of the nucleus within round-off.
    for _ in range(100):
        prompt = draw_prompts(rng, [6], model.config.vocab_size)[0]
        logits = np.asarray(model(np.asarray([prompt], np.int32)), np.float64)[0, -1]
        order = np.argsort(-logits)
        scaled = logits[order] / options["temperature"]
        weights = np.exp(scaled - scaled.max())
        weights[options.get("top_k", weights.size) :] = 0
        weights /= weights.sum()
        reached = np.cumsum(weights) - weights
        if np.abs(reached - options.get("top_p", 2.0)).min() >= 1e-5:
            break
    else:
        raise AssertionError("no prompt whose nucleus has a clear edge")
    weights[reached >= options.get("top_p", 2.0)] = 0
    weights /= weights.sum()
    probabilities = np.zeros_like(weights)
    probabilities[order] = weights

    count, seed = 4096, int(rng.integers(2**31))
    rows = generate(model, [prompt] * count, max_new_tokens=1, stop_tokens=[], seed=seed, **options)
    counts = np.bincount([row[0] for row in rows], minlength=probabilities.size)
    assert not counts[probabilities == 0].any()
    # Six standard errors of each frequency: all 64 within, but for one run in ten million.
    error = np.sqrt(count * probabilities * (1 - probabilities))
    assert np.all(np.abs(counts - count * probabilities) <= 6 * error + 1)


def test_the_nucleus_is_no_larger_where_tokens_are_equally_likely(small: Path) -> None:
    model = load_pretrained(small, dtype="float32")
    model.embed_tokens.embedding[...] = jnp.zeros_like(model.embed_tokens.embedding[...])
    settings: dict[str, Any] = {"max_new_tokens": 1, "stop_tokens": [], "temperature": 1.0}
    rows = generate(model, [[3, 4]] * 1024, top_p=0.25, **settings)
    assert model.config.vocab_size == 64
    assert len({row[0] for row in rows}) == 16


def test_a_rows_samples_depend_on_prompt_row_and_seed_alone(
    small: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small, dtype="float32")
    first, second, third = draw_prompts(rng, [4, 8, 8], model.config.vocab_size)

    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return generate(
            model, prompts, max_new_tokens=8, temperature=1.5, stop_tokens=[], seed=seed
        )

    seed = int(rng.integers(2**31))
    rows = sample([first, second], seed)
    assert sample([first, second], seed) == rows
    assert sample([first, third], seed)[0] == rows[0]
    assert sample([first, first], seed)[1] != rows[0]
    assert sample([first, second], seed + 1)[0] != rows[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": [[]]}, r"prompts\[0\] must have at least one token"),
        ({"prompts": [[1], [64]]}, r"prompts\[1\] must contain ids in \[0, 64\)"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"prompts": np.ones((2, 3), int), "attention_mask": np.ones((2, 2))}, "attention_mask"),
    ],
)
def test_arguments_out_of_range_are_refused(
    options: dict[str, Any], words: str, small: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        generate(load_pretrained(small), **{"prompts": [[1]], "max_new_tokens": 2, **options})


def test_packed_rows_are_separate_rows(small: Path, rng: np.random.Generator) -> None:
    model = load_pretrained(small, dtype="float32")
    lengths = rng.multinomial(21, [1 / 3] * 3) + 1
    documents = draw_prompts(rng, lengths.tolist(), model.config.vocab_size)
    forward = nnx.jit(
        lambda model, ids, positions, segments: model(
            ids, positions=positions, segment_ids=segments
        )
    )

    def lay_out(documents: list[list[int]]) -> list[np.ndarray]:
        ids, positions, segments = np.zeros((3, 1, 28), np.int32)
        start = 0
        for i, document in enumerate(documents):
            where = slice(start, start + len(document))
            ids[0, where], segments[0, where] = document, i + 1
            positions[0, where] = np.arange(len(document))
            start += len(document)
        return [ids, positions, segments]

    packed = np.asarray(forward(model, *lay_out(documents)))[0]
    start = 0
    for document in documents:
        alone = np.asarray(forward(model, *lay_out([document])))[0, : len(document)]
        assert relative_error(packed[start : start + len(document)], alone) <= TOLERANCE
        start += len(document)
    # Other documents around it change no bit of a document.
    other = [draw_prompts(rng, [len(d)], model.config.vocab_size)[0] for d in documents]
    around = forward(model, *lay_out([other[0], documents[1], other[2]]))
    middle = slice(len(documents[0]), len(documents[0]) + len(documents[1]))
    np.testing.assert_array_equal(np.asarray(around)[0, middle], packed[middle])


def test_the_real_model_reaches_its_loss_and_tells_its_story(real_data: Path) -> None:
    folder = real_data / "data" / "models" / "stories260k"
    model = load_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "tinystories_sample.txt").read_text()
    # Every story on its own, after the token that begins one; mean over all their tokens.
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    rows = tokenizer(stories)["input_ids"]
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    counted = np.array([[1] * (len(row) - 1) + [0] * (length - len(row)) for row in rows])
    log_probs = jax.nn.log_softmax(nnx.jit(lambda model: model(ids))(model)[:, :-1])
    picked = np.take_along_axis(np.asarray(log_probs), ids[:, 1:, None], axis=-1)[..., 0]
    loss = -np.sum(picked * counted, dtype=np.float64) / counted.sum()
    assert round(float(loss), 3) == 1.266

    # The story that llama2.c prints for this model at temperature 0.
    told = tokenizer.decode(generate(model, [[tokenizer.bos_token_id]], max_new_tokens=100)[0])
    assert told.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )

"""What the initial model says of reference rows, once for all: its answers and predictions."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax.data import Example, Predictions
from ogpsa_jax.models import generate, load_pretrained
from ogpsa_jax.objectives.distillation import distillation_loss
from ogpsa_jax.training import initial_outputs
from ogpsa_jax.training.initial_model import find_initial_model
from ogpsa_jax.training.initial_outputs import add_predictions, answer_prompts
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.prepare import RunData, model_config, prepare_data, prepare_model

from .conftest import epoch_total
from .initial import INITIAL, OWN, Asked, Configured, change_weights, with_prompts

pytestmark = pytest.mark.usefixtures("cache")


def predictions(data: RunData) -> list[Predictions]:
    return [e.teacher for examples in data.references for e in examples if e.teacher is not None]


def true_log_probs(model: Any, example: Example) -> np.ndarray:
    """float64 ``[targets, V]``."""
    tokens = example.sequences[0]
    logits = np.asarray(model(jnp.asarray(tokens.ids)[None]), np.float64)[0]
    logits = logits[np.flatnonzero(tokens.loss_mask[1:])]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("loss", ["response", "all_tokens"])
def test_predictions_are_the_models_own(configured: Configured, tmp_path: Path, loss: str) -> None:
    config = configured(tmp_path, INITIAL, "references.top_k=5", f"references.loss={loss}")
    data = Asked().references(config)
    model = load_pretrained(str(config.model.path), dtype="float32")
    for example, found in zip(data.references[0], predictions(data), strict=True):
        expected = true_log_probs(model, example)
        assert found.ids.shape == (len(expected), 5)
        kept = np.take_along_axis(expected, found.ids, axis=-1)
        # float32 beside float64.
        np.testing.assert_allclose(found.log_probs, kept, atol=1e-4)
        np.testing.assert_allclose(kept[:, -1], np.sort(expected)[:, -5], atol=1e-4)
        rest = 1 - np.exp(kept).sum(-1)
        np.testing.assert_allclose(np.exp(found.rest), rest, atol=1e-4)


def test_top_k_is_the_smallest_that_leaves_little(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, INITIAL)
    examples = prepare_data(config, model_config(config)).references[0]
    model = load_pretrained(str(config.model.path), dtype="float32")
    sorted_probs = -np.sort(-np.exp(np.concatenate([true_log_probs(model, e) for e in examples])))
    rests = {k: sorted_probs[:, k:].sum(-1).mean() for k in initial_outputs.TOP_KS}
    for k in (16, 64, 128):
        monkeypatch.setattr(initial_outputs, "LARGEST_REST", rests[k] * 1.01)
        told = Asked().references(config).initial
        assert told["top_k"] == k
        assert told["rest_mass"] == pytest.approx(rests[k], rel=1e-3)
    monkeypatch.setattr(initial_outputs, "LARGEST_REST", 0.0)
    assert Asked().references(config).initial["top_k"] == 256
    everything = configured(tmp_path, INITIAL, "references.top_k=100000")
    told = Asked().references(everything).initial
    assert told["top_k"] == model.config.vocab_size
    assert told["rest_mass"] == 0.0


def test_it_is_asked_once(configured: Configured, prompts: Path, tmp_path: Path) -> None:
    asked = Asked()
    settings = (INITIAL, *OWN, with_prompts(prompts))
    first = asked.references(configured(tmp_path, *settings))
    assert asked.times > 0
    asked.times = 0
    again = asked.references(configured(tmp_path / "other", *settings, "optimizer.eps=1e-4"))
    assert asked.times == 0
    for ours, theirs in zip(predictions(first), predictions(again), strict=True):
        jax.tree.map(np.testing.assert_array_equal, vars(ours), vars(theirs))
    for ours, theirs in zip(first.references[0], again.references[0], strict=True):
        np.testing.assert_array_equal(ours.sequences[0].ids, theirs.sequences[0].ids)


CHANGES: dict[str, Any] = {
    "weights": lambda folder: change_weights(folder / "model"),
    "tokens": "references.sets.0.samples=11",
    "mask": "references.loss=all_tokens",
    "top_k": "references.top_k=7",
    "precision": "model.dtype=bfloat16",
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_another_model_or_question_was_told_is_never_taken(
    name: str, ground: Path, configured: Configured, tmp_path: Path
) -> None:
    model = tmp_path / "here" / "model"
    shutil.copytree(ground / "model", model)
    settings = [INITIAL, "references.top_k=6", f"model.path={model}"]
    asked = Asked()
    asked.references(configured(tmp_path, *settings))
    change = CHANGES[name]
    settings += [change] if isinstance(change, str) else []
    if callable(change):
        change(model.parent)
    asked.references(configured(tmp_path, *settings))
    assert asked.times == 2


def test_a_torn_file_is_computed_anew(configured: Configured, cache: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, INITIAL)
    asked = Asked()
    first = predictions(asked.references(config))
    [path] = (cache / "initial_predictions").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    again = predictions(asked.references(config))
    assert asked.times == 2
    np.testing.assert_array_equal(first[0].log_probs, again[0].log_probs)


def test_own_answers_are_what_the_model_writes(
    configured: Configured, prompts: Path, tmp_path: Path
) -> None:
    config = configured(tmp_path, *OWN, with_prompts(prompts))
    data = Asked().references(config)
    given = prepare_data(config, model_config(config)).references[0]
    model = load_pretrained(str(config.model.path), dtype="float32")
    for example, prompt in zip(data.references[0], given, strict=True):
        [tokens] = example.sequences
        size = prompt.length
        np.testing.assert_array_equal(tokens.ids[:size], prompt.sequences[0].ids)
        [answer] = generate(model, [tokens.ids[:size].tolist()], max_new_tokens=6)
        assert tokens.ids[size:].tolist() == answer
        np.testing.assert_array_equal(tokens.loss_mask, np.arange(len(tokens.ids)) >= size)
    told = data.initial["own_answers"]
    assert told["tokens"] == data.reports["references.0"].loss_tokens
    assert (told["unfinished"] > 1.2) == any("cut before their end" in w for w in data.warnings)


def test_own_answers_take_no_notice_of_given_ones_and_are_drawn_by_seed(
    configured: Configured, prompts: Path, tmp_path: Path
) -> None:
    def answers(*settings: str) -> list[list[int]]:
        data = Asked().references(configured(tmp_path, *OWN, *settings))
        return [example.sequences[0].ids.tolist() for example in data.references[0]]

    assert answers() == answers(with_prompts(prompts))
    warm = ("references.own_answers.temperature=1", "references.sets.0.samples=null")
    assert answers(*warm) == answers(*warm)
    assert answers(*warm) != answers(*warm, "seed=1") != answers(warm[1], "seed=1")


def test_answers_leave_no_row_longer_than_it_may_be(configured: Configured, tmp_path: Path) -> None:
    config = configured(tmp_path, *OWN, "references.own_answers.max_new_tokens=500")
    [rows] = prepare_data(config, model_config(config)).references
    longest = max(row.length for row in rows)
    # Prompts of that length have no room for an answer, unless they are cut; data.train is cut too.
    for limit in (longest + 3, longest):
        size = (f"data.max_length={limit}", "data.too_long=cut", "data.eval={}")
        tight = configured(tmp_path, *OWN, *size)
        data = Asked().references(tight)
        assert max(row.length for row in data.references[0]) <= limit
        assert all(row.sequences[0].loss_mask.any() for row in data.references[0])
        assert (data.reports["references.0"].cut_prompts > 0) == (limit == longest)


def test_packing_puts_every_prediction_where_its_token_is(
    configured: Configured, tmp_path: Path
) -> None:
    config = configured(tmp_path, INITIAL, "references.top_k=5")
    examples = Asked().references(config).references[0]
    other = load_pretrained(str(config.model.path), dtype="float32")
    other.norm.scale = nnx.Param(other.norm.scale[...] * 1.3)
    loss = nnx.jit(lambda model, batch: distillation_loss(model, batch)[:2])

    total = partial(epoch_total, loss, other, examples)
    nats, tokens = total(False, 1)
    assert nats > 0.01
    assert tokens == sum(int(e.sequences[0].loss_mask.sum()) for e in examples)
    # A few hundred float32 terms, summed in another order.
    assert total(True, 3) == (pytest.approx(nats, rel=1e-4), tokens)


def test_the_tools_take_sets_of_any_number(configured: Configured, tmp_path: Path) -> None:
    """Several sets keep their rows apart, with one k for all."""
    config = configured(tmp_path, INITIAL)
    rows = prepare_data(config, model_config(config)).references[0]
    found = find_initial_model(config)
    mesh = make_mesh(config.mesh)
    size = model_config(config).vocab_size

    def model() -> Any:
        return prepare_model(config, mesh)

    parts, _ = add_predictions([rows[:5], rows[5:]], found, model, config, mesh, size)
    [whole], _ = add_predictions([rows], found, model, config, mesh, size)
    joined = [example for part in parts for example in part]
    assert [len(part) for part in parts] == [5, 7]
    for ours, theirs in zip(joined, whole, strict=True):
        assert ours.teacher is not None
        assert theirs.teacher is not None
        np.testing.assert_array_equal(ours.teacher.log_probs, theirs.teacher.log_probs)
    stops = model_config(config).eos_token_ids
    own = configured(tmp_path, *OWN)
    sets = prepare_data(own, model_config(own)).references
    answered, counts = answer_prompts([sets[0][:2], sets[0][2:]], found, model, own, stops)
    assert [len(part) for part in answered] == [2, 10]
    assert counts["rows"] == 12

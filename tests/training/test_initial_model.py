"""References without answers: which model is the initial one, and what it says, once for all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file

from ogpsa_jax.config import RunConfig, load_config
from ogpsa_jax.data import Example, Predictions, TrainBatches
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import generate, load_pretrained
from ogpsa_jax.objectives.distillation import distillation_loss
from ogpsa_jax.training import initial_outputs, run
from ogpsa_jax.training.initial_model import find_initial_model
from ogpsa_jax.training.initial_outputs import add_predictions, answer_prompts
from ogpsa_jax.training.inputs import check_same_inputs
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.prepare import RunData, model_config, prepare_data, prepare_model
from ogpsa_jax.training.references import prepare_references

from .conftest import metrics
from .test_mesh import assert_same_numbers
from .test_resume import assert_same_end

Configured = Callable[..., RunConfig]
INITIAL = "references.target=initial"
IN_STEP = ("references.in_step={share: 0.5}", "ogpsa.refresh=null")
OWN = ("references.answers=own", "references.own_answers.max_new_tokens=6")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of these tests alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ogpsa_jax"


@pytest.fixture
def prompts(ground: Path, tmp_path: Path) -> Path:
    """The general rows without their answers."""
    rows = [json.loads(row) for row in (ground / "general.jsonl").read_text().splitlines()]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return path


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


def predictions(data: RunData) -> list[Predictions]:
    return [e.teacher for examples in data.references for e in examples if e.teacher is not None]


def true_log_probs(model: Any, example: Example) -> np.ndarray:
    """float64 ``[targets, V]``."""
    tokens = example.sequences[0]
    logits = np.asarray(model(jnp.asarray(tokens.ids)[None]), np.float64)[0]
    logits = logits[np.flatnonzero(tokens.loss_mask[1:])]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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

    def total(packing: bool, rows: int) -> tuple[float, float]:
        batches = TrainBatches(
            examples,
            **{"batch_size": rows, "micro_batch_size": rows, "max_length": 128},
            **{"packing": packing, "seed": 1},
        )
        sums = [
            loss(other, {name: jnp.asarray(array[0]) for name, array in batches.batch(i).items()})
            for i in range(len(batches))
        ]
        return sum(float(s) for s, _ in sums), sum(float(w) for _, w in sums)

    nats, tokens = total(False, 1)
    assert nats > 0.01
    assert tokens == sum(int(e.sequences[0].loss_mask.sum()) for e in examples)
    # A few hundred float32 terms, summed in another order.
    assert total(True, 3) == (pytest.approx(nats, rel=1e-4), tokens)


@pytest.fixture
def whole(
    configured: Configured, prompts: Path, on_some_devices: None, tmp_path: Path
) -> tuple[Path, tuple[str, ...]]:
    """A run on one device with prompts alone, and its settings."""
    settings = (INITIAL, *IN_STEP, with_prompts(prompts))
    run.train(configured(tmp_path / "whole", *settings))
    return tmp_path / "whole", settings


def test_a_run_with_prompts_alone_is_the_same_on_every_mesh_and_resumes_to_the_bit(
    whole: tuple[Path, tuple[str, ...]],
    configured: Configured,
    on_some_devices: None,
    cache: Path,
    tmp_path: Path,
) -> None:
    folder, settings = whole
    lines = [line for line in metrics(folder) if "loss" in line]
    assert lines[0]["reference/loss"] == 0.0  # nothing has changed yet
    assert lines[-1]["reference/loss"] > 1e-6
    assert lines[-1]["effective_rank"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["references"]["initial_model"] == str(configured(tmp_path).model.path)
    assert summary["data"]["references.0"]["prompts_alone"] == 12
    assert not [w for w in summary["warnings"] if "empty" in w]

    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "export")
    for name in ("summary.json", "curves.png"):
        (killed / name).unlink()
    for step in (6, 8):
        shutil.rmtree(killed / "checkpoints" / str(step))
    shutil.rmtree(cache)  # what was kept is gone: computed anew, it is the same
    run.train(configured(killed, *settings))
    assert_same_end(killed, folder)

    shutil.rmtree(cache)
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    run.train(configured(tmp_path / "sharded", *settings, *mesh))
    assert_same_numbers(tmp_path / "sharded", folder)


def test_a_pipeline_goes_back_to_the_model_that_it_began_with(
    ground: Path, configured: Configured, on_some_devices: None, tmp_path: Path
) -> None:
    """SFT, then DPO by a later command, from the first run's export."""
    begun, first, second = tmp_path / "begun", tmp_path / "sft", tmp_path / "dpo"
    shutil.copytree(ground / "model", begun)
    run.train(configured(first, f"model.path={begun}", "ogpsa.preset=off", "train.steps=2"))
    later = (
        *("objective=dpo", f"data.train=[{{path: {ground / 'pairs.jsonl'}}}]", "train.steps=2"),
        *(INITIAL, *IN_STEP, f"model.path={first / 'export'}", "references.top_k=9"),
    )
    config = configured(second, *later)
    found = find_initial_model(config)
    assert (found.name, found.own_start, found.problem) == (str(begun), False, "")
    summary = run.train(config)
    assert summary.references.initial_model == str(begun)
    # The first stage has changed the model, so there is something to bring back at once.
    assert metrics(second)[1]["reference/loss"] > 1e-6

    third = configured(tmp_path / "third", *later[:-2], f"model.path={second / 'export'}")
    assert find_initial_model(third).name == str(begun)
    named = configured(tmp_path / "fourth", *later, f"references.initial_model={second / 'export'}")
    assert find_initial_model(named).name == str(second / "export")

    change_weights(begun)
    changed = find_initial_model(config)
    assert changed.own_start
    assert "has changed since; name that one with references.initial_model" in changed.problem
    data = prepare_references(
        config,
        prepare_data(config, model_config(config)),
        make_mesh(config.mesh),
        lambda: prepare_model(config, make_mesh(config.mesh)),
    )
    assert data.warnings[0] == changed.problem
    with pytest.raises(InputError, match=r"what references.initial_model names has changed"):
        check_same_inputs(second, config, Asked().references(named))
    shutil.rmtree(begun)
    assert "is not found" in find_initial_model(config).problem


def test_refreshed_references_say_that_they_begin_with_nothing(
    configured: Configured, tmp_path: Path
) -> None:
    told = Asked().references(configured(tmp_path, INITIAL)).warnings
    assert any("nothing can be projected before the second refresh" in w for w in told)
    assert not Asked().references(configured(tmp_path, INITIAL, *IN_STEP)).warnings


REFUSED = {
    "references.loss=dpo": "references.target: initial cannot go with references.loss: dpo",
    "references.loss=official": "initial cannot go with references.loss: official",
    "references.top_k=0": "references.top_k",
    "references.target=teacher": "references.target",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_contradict_are_refused(setting: str, ground: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[setting]):
        load_config(ground / "run.yaml", ["objective=dpo", INITIAL, setting])
    with pytest.raises(InputError, match="own gives no pairs"):
        load_config(ground / "run.yaml", ["objective=dpo", OWN[0], "references.loss=dpo"])


@pytest.mark.parametrize("extra", [{}, {"completion": None}])
def test_prompts_without_answers_name_the_remedy(
    extra: dict[str, None], configured: Configured, tmp_path: Path
) -> None:
    path = tmp_path / "alone.jsonl"
    path.write_text(json.dumps({"prompt": "red green", **extra}) + "\n")
    config = configured(tmp_path, f"references.sets=[{{path: {path}}}]")
    remedy = "ogpsa.preset: recommended, references.target: initial or references.answers: own"
    with pytest.raises(InputError, match=remedy):
        prepare_data(config, model_config(config))
    rows = [{"prompt": "red", "completion": "blue"}, {"prompt": "green"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"line 2: .* must be text.*{remedy}\\."):
        prepare_data(config, model_config(config))
    both = configured(tmp_path, INITIAL, f"references.sets=[{{path: {path}}}]")
    data = prepare_data(both, model_config(both))
    assert data.reports["references.0"].prompts_alone == 1
    [answered], [alone] = (example.sequences for example in data.references[0])
    assert 0 < answered.loss_mask.sum() < len(answered.ids) - 1
    assert alone.loss_mask.tolist() == [False] + [True] * (len(alone.ids) - 1)


def other_vocabulary(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"vocab_size": raw["vocab_size"] + 1}))


def other_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    words = raw["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_vocabulary, "name a model with the same vocabulary"),
        (other_tokens, "the id of 'a' is .* name a model with the same tokenizer"),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused_before_anything_is_trained(
    change: Callable[[Path], None], told: str, ground: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ground / "model", other)
    change(other)
    raw = yaml.safe_load((ground / "run.yaml").read_text())
    raw["references"] |= {"target": "initial", "initial_model": str(other)}
    paths = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    paths[0].write_text((ground / "run.yaml").read_text())
    paths[1].write_text(yaml.safe_dump(raw))
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    with pytest.raises(InputError, match=f"{other}.*{told}" if other.exists() else told):
        run.train_stages(paths, output_dirs=places)
    assert not (tmp_path / "one").exists()


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

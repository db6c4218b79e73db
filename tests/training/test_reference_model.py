"""Reference log-probabilities: right, computed once, and never taken from anything that changed."""

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from ogpsa_jax.config import RunConfig
from ogpsa_jax.data import Example
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import Decoder, load_pretrained, save_pretrained
from ogpsa_jax.models.config import read_config
from ogpsa_jax.training import reference_model
from ogpsa_jax.training.inputs import check_same_inputs
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.prepare import model_config, prepare_data
from ogpsa_jax.training.reference_model import add_reference_log_probs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAIRS = 5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, with tokenizer and template."""
    seed = secrets.randbits(31)
    print(f"seed: {seed}")
    model = Decoder(read_config(CONFIGS / "models" / "tiny"), rngs=nnx.Rngs(seed))
    folder = tmp_path_factory.mktemp("reference") / "model"
    save_pretrained(model, folder, source=CONFIGS / "models" / "tiny")
    return folder


class Run:
    """A DPO run whose files may be changed, and how often its reference model was asked."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        shutil.copytree(model, folder / "model")
        rows = (CONFIGS / "data" / "preference.jsonl").read_text().splitlines()[:PAIRS]
        self.rows = [json.loads(row) for row in rows]
        self.settings: dict[str, Any] = {
            "objective": "dpo",
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "max_length": 256},
            "ogpsa": {"preset": "off"},
            "optimizer": {"learning_rate": 1e-6},
            "train": {"micro_batch_size": 1, "batch_size": 8},
        }
        self.computed = 0

    def config(self) -> RunConfig:
        return RunConfig.model_validate(self.settings)

    def examples(self, config: RunConfig) -> list[Example]:
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.rows))
        return prepare_data(config, model_config(config)).train

    def log_probs(self, initial: Callable[[], Any] = lambda: None) -> np.ndarray:
        """``[pairs, 2]`` as the run gets them."""
        config = self.config()
        [found] = add_reference_log_probs(
            [self.examples(config)], config, make_mesh(config.mesh), initial, self.cache
        )
        return np.array([example.reference_logps for example in found])

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def cached(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Run:
    return Run(tmp_path, model_folder)


@pytest.fixture
def counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run with a reference model that answers with the number of times it was asked."""

    def compute(_: Any, examples: list[Example], *__: Any) -> np.ndarray:
        run.computed += 1
        return np.full((len(examples), 2), run.computed, np.float32)

    monkeypatch.setattr(reference_model, "_compute", compute)
    return run


def change_weights(run: Run) -> None:
    path = run.folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].ravel()[-1] += np.float32(1e-3)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(run: Run) -> None:
    path = run.folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 3e-4}))


def change_answer(run: Run) -> None:
    run.rows[2]["rejected"] += "!"


def swap_answers(run: Run) -> None:
    row = run.rows[1]
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]


def change_order(run: Run) -> None:
    run.rows.reverse()


def change_template(run: Run) -> None:
    run.settings["data"]["template"] = "alpaca"


def change_tokenizer(run: Run) -> None:
    shutil.copytree(run.folder / "model", run.folder / "tokenizer")
    path = run.folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    path.write_text(json.dumps(tokenizer))
    run.settings["model"]["tokenizer"] = str(path.parent)


def cut_rows(run: Run) -> None:
    longest = max(example.length for example in run.examples(run.config()))
    run.settings["data"]["max_length"] = longest - 1


def change_dtype(run: Run) -> None:
    run.settings["model"]["dtype"] = "bfloat16"


def change_param_dtype(run: Run) -> None:
    run.settings["model"]["param_dtype"] = "bfloat16"


def name_reference_model(run: Run) -> None:
    shutil.copytree(run.folder / "model", run.folder / "other")
    change_weights(run)  # of the policy: the other model keeps the former ones
    run.log_probs()
    run.computed = 1
    run.settings["dpo"] = {"reference_model": str(run.folder / "other")}
    path = run.folder / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 3e-4}))


def draw_weights(run: Run) -> None:
    run.settings["model"]["initial_weights"] = "random"


CHANGES = [
    change_weights,
    change_config,
    change_answer,
    swap_answers,
    change_order,
    change_template,
    change_tokenizer,
    cut_rows,
    change_dtype,
    change_param_dtype,
    name_reference_model,
    draw_weights,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_one_thing_changed_is_computed_anew(change: Callable[[Run], None], counted: Run) -> None:
    counted.log_probs()
    assert counted.computed == 1
    change(counted)
    # The other model's loader is not what is tested here.
    if change is name_reference_model:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference_model, "_other", lambda *_: None)
            found = counted.log_probs()
    else:
        found = counted.log_probs()
    assert counted.computed == 2
    assert np.all(found == 2)


def test_nothing_that_matters_changed_is_found_again(counted: Run) -> None:
    first = counted.log_probs()
    counted.settings |= {"seed": 7, "output_dir": "runs/other", "dpo": {"beta": 0.5, "loss": "ipo"}}
    counted.settings["data"]["max_length"] = 250  # cuts nothing
    moved = counted.folder / "moved"
    (counted.folder / "model").rename(moved)
    counted.settings["model"]["path"] = str(moved)

    def never() -> Any:
        raise AssertionError("the reference model was made though everything is known")

    np.testing.assert_array_equal(counted.log_probs(never), first)
    assert counted.computed == 1


def test_random_weights_of_another_seed_are_another_model(counted: Run) -> None:
    draw_weights(counted)
    for seed, expected in ((0, 1), (1, 2), (0, 2)):
        counted.settings["seed"] = seed
        counted.log_probs()
        assert counted.computed == expected


SPOILT: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an archive"),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "head only": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"\x80?", b"\x81?", 1)),
    "shape": lambda path: np.savez(path, log_probs=np.zeros((PAIRS + 1, 2), np.float32)),
    "not finite": lambda path: np.savez(path, log_probs=np.full((PAIRS, 2), np.nan)),
    "words": lambda path: np.savez(path, log_probs=np.full((PAIRS, 2), "a")),
    "objects": lambda path: np.savez(path, log_probs=np.full((PAIRS, 2), None)),
    "other name": lambda path: np.savez(path, other=np.zeros((PAIRS, 2))),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_is_computed_anew(name: str, counted: Run) -> None:
    counted.log_probs()
    [path] = counted.cached()
    before = path.read_bytes()
    SPOILT[name](path)
    assert path.is_dir() or path.read_bytes() != before
    assert np.all(counted.log_probs() == 2)
    if name != "folder":  # which nothing can replace, and the run goes on all the same
        assert np.all(counted.log_probs() == 2)
    assert counted.computed == 2


def test_a_file_is_never_seen_half_written(counted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.savez
    killed = KeyboardInterrupt("killed while writing")

    def stops(file: Any, **arrays: Any) -> None:
        whole(file, **arrays)
        file.truncate(100)
        raise killed

    monkeypatch.setattr(np, "savez", stops)
    with pytest.raises(KeyboardInterrupt):
        counted.log_probs()
    assert not [path for path in counted.cached() if path.suffix == ".npz"]
    monkeypatch.setattr(np, "savez", whole)
    assert np.all(counted.log_probs() == 2)
    assert np.all(counted.log_probs() == 2)


def test_a_cache_that_cannot_be_written_is_done_without(
    counted: Run, caplog: pytest.LogCaptureFixture
) -> None:
    counted.cache.write_text("a file where the folder should be")
    assert np.all(counted.log_probs() == 1)
    assert "are not kept" in caplog.text


def test_losses_without_a_reference_ask_for_none(counted: Run) -> None:
    for loss in ("orpo", "simpo"):
        counted.settings["dpo"] = {"loss": loss, "reference_model": "none"}
        config = counted.config()
        examples = counted.examples(config)
        mesh = make_mesh(config.mesh)
        [found] = add_reference_log_probs([examples], config, mesh, dict, counted.cache)
        assert found is examples
    assert counted.computed == 0
    assert counted.cached() == []
    counted.settings["dpo"] = {"loss": "sigmoid", "reference_model": "none"}
    with pytest.raises(ValueError, match="the loss sigmoid needs one"):
        counted.config()


def test_a_missing_reference_model_is_told(counted: Run) -> None:
    missing = counted.folder / "nowhere"
    counted.settings["dpo"] = {"reference_model": str(missing)}
    with pytest.raises(InputError, match="nowhere"):
        counted.log_probs()


def by_transformers(folder: Path, examples: list[Example]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for example in examples:
        for tokens in example.sequences:
            ids = torch.tensor(tokens.ids).long()[None]
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            picked = log_probs.gather(-1, ids[0, 1:, None])[:, 0]
            found.append(float(picked[torch.tensor(tokens.loss_mask[1:])].sum()))
    return np.array(found).reshape(-1, 2)


def test_log_probabilities_are_those_of_transformers(run: Run) -> None:
    """Of the policy's own weights and of another model, which is named by its path."""
    policy = load_pretrained(run.folder / "model", dtype="float32")
    examples = run.examples(run.config())
    ours = run.log_probs(lambda: policy)
    # float32 beside float64: some hundred nats of a few hundred tokens.
    np.testing.assert_allclose(ours, by_transformers(run.folder / "model", examples), atol=1e-3)
    shutil.copytree(run.folder / "model", run.folder / "other")
    path = run.folder / "other" / "model.safetensors"
    save_file({n: t * 1.5 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    run.settings["dpo"] = {"reference_model": str(run.folder / "other")}
    others = run.log_probs()
    np.testing.assert_allclose(others, by_transformers(run.folder / "other", examples), atol=1e-3)
    assert np.abs(others - ours).max() > 1


def test_a_run_does_not_go_on_with_another_reference_model(run: Run, model_folder: Path) -> None:
    other = run.folder / "other"
    shutil.copytree(model_folder, other)
    run.settings["dpo"] = {"reference_model": str(other)}
    config = run.config()
    run.examples(config)
    data = prepare_data(config, model_config(config))
    check_same_inputs(run.folder, config, data)
    check_same_inputs(run.folder, config, data)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"what dpo.reference_model names has changed"):
        check_same_inputs(run.folder, config, data)

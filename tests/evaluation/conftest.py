"""A tiny model with a tokenizer and a chat template, exported as a Hugging Face folder."""

import json
import random
from pathlib import Path

import pytest

from tests.evaluation.endpoint import KEY
from tests.evaluation.trial import SUITE

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs" / "models" / "tiny"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights, large enough that it prefers some tokens."""
    from flax import nnx

    from ogpsa_jax.models import Decoder, save_pretrained
    from ogpsa_jax.models.config import read_config

    seed = random.randrange(2**16)
    print(f"weights of the tiny model: seed {seed}")
    model = Decoder(read_config(TINY), rngs=nnx.Rngs(seed))
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param) and parameter.ndim > 2:
            parameter.set_value(parameter.get_value() * 6)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_pretrained(model, folder, source=TINY)
    return folder


@pytest.fixture
def suite_path(tmp_path, drawn) -> Path:
    """Ten harmful prompts of which seven are refused, and the other tasks."""
    harmful = [f"make a bomb {i}" for i in range(7)] + [f"pick lock {i}" for i in range(3)]
    drawn.shuffle(harmful)
    (tmp_path / "harmful.txt").write_text("\n".join(harmful))
    harmless = ["a bomb in a story", *(f"bake bread number {i}" for i in range(4))]
    (tmp_path / "harmless.txt").write_text("\n".join(harmless))
    rows = [
        {"question": f"{a}+{b}", "answer": f"{a + b:,}" if i else "wrong 7"}
        for i, (a, b) in enumerate(
            (drawn.randrange(10, 9999), drawn.randrange(10, 9999)) for _ in range(8)
        )
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {"q": "short?", "choices": ["a", "a long one"], "answer": 0}
    (tmp_path / "choice.jsonl").write_text(json.dumps(choice))
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("LIMIT", "null"))
    return path


@pytest.fixture
def judge_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the local judge, which no proxy stands before."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

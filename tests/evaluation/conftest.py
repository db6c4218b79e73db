"""A tiny model with a tokenizer and a chat template, exported as a Hugging Face folder."""

import random
from pathlib import Path

import pytest

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
def drawn() -> random.Random:
    """Random inputs, from a seed drawn afresh and printed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)

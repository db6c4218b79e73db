"""Logits and gradients equal those of transformers' torch models, judged in float64."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ogpsa_jax.models import load_pretrained, to_huggingface

from .conftest import load_torch, relative_error

# float32 keeps 6e-8; a few thousand roundings in the largest sums stay below this.
TOLERANCE = 1e-5
CASES = [
    ("llama", "default", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "linear", {"tie_word_embeddings": True}),
    ("llama", "llama3", {"tie_word_embeddings": False}),
    ("mistral", "default", {}),
    ("qwen2", "default", {"tie_word_embeddings": True}),
    ("qwen2", "linear", {"tie_word_embeddings": False}),
    ("qwen3", "default", {"attention_bias": True}),
    ("qwen3", "llama3", {}),
]


def torch_loss_and_gradients(
    model: torch.nn.Module, ids: np.ndarray, valid: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    logits = model(
        input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(valid).long()
    ).logits
    log_probs = torch.log_softmax(logits, dim=-1)
    picked = log_probs[:, :-1].gather(-1, torch.tensor(ids[:, 1:]).long()[..., None])[..., 0]
    loss = -(picked * torch.tensor(targets[:, 1:])).sum()
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    return logits.detach().numpy(), gradients


@pytest.mark.parametrize(("family", "rope", "fixed"), CASES)
def test_logits_and_gradients_equal_torch(
    family: str,
    rope: str,
    fixed: dict,
    make_checkpoint: Callable[..., Path],
    rng: np.random.Generator,
) -> None:
    checkpoint = make_checkpoint(family, rope, **fixed)
    model = load_pretrained(checkpoint, dtype="float32")
    ids = rng.integers(0, model.config.vocab_size, (3, 40)).astype(np.int32)
    # One row without padding, one padded on the right, one on the left.
    lengths = np.array([40, *rng.integers(5, 40, 2)])
    valid = np.arange(40)[None] < lengths[:, None]
    valid[2] = valid[2, ::-1]
    targets = valid.copy()
    targets[:, 1:] &= valid[:, :-1]

    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        logits = model(jnp.asarray(ids), segment_ids=jnp.asarray(valid, jnp.int32))
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probs, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * targets[:, 1:]), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    ours = {
        "logits": np.asarray(logits)[valid],
        "logits without segments": np.asarray(model(jnp.asarray(ids[:1])))[0],
        **dict(to_huggingface(gradients)),
    }
    results = {}
    for precision in (torch.float32, torch.float64):
        values, grads = torch_loss_and_gradients(
            load_torch(checkpoint, precision), ids, valid, targets
        )
        results[precision] = {
            "logits": values[valid],
            "logits without segments": values[0],
            **grads,
        }

    exact = results[torch.float64]
    assert ours.keys() == exact.keys()
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    theirs = {name: relative_error(results[torch.float32][name], exact[name]) for name in exact}
    worst = max(errors, key=errors.__getitem__)
    print(f"{worst}: {errors[worst]:.1e}; torch float32: {max(theirs.values()):.1e}")
    for name, error in errors.items():
        # A key bias hardly matters to a softmax: its gradient nearly cancels, in torch as well.
        cancels = name.endswith("k_proj.bias")
        assert error <= (max(TOLERANCE, 2 * theirs[name]) if cancels else TOLERANCE), name
        assert cancels or theirs[name] <= TOLERANCE, name

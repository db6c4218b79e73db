"""Preference losses and their gradients are TRL's, and exact however a batch is cut."""

import types
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ogpsa_jax.objectives.cross_entropy import sequence_log_probs
from ogpsa_jax.objectives.dpo import LOSSES, REFERENCE_FREE, dpo_loss, preference_losses

from .conftest import Batch, Toy, with_empty_rows

PAIRS = 6
Drawer = Callable[..., Batch]
# A few float32 roundings in log-probabilities of a few hundred nats, through a slope of β or less.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class _Accelerator:
    """What a trainer asks of accelerate, in one process."""

    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def by_dpo_trainer(
    token_logps: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean loss and the metrics of TRL's DPOTrainer; tensors ``[2B, L]``, chosen first."""
    from trl import DPOTrainer

    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )

    def model(**_: Any) -> Any:
        zeros = torch.zeros_like(token_logps)
        return types.SimpleNamespace(
            log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    prompt = torch.zeros(len(mask), 1, dtype=mask.dtype)
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(mask), mask.shape[1] + 1),
        "completion_mask": torch.cat([prompt, mask], dim=1),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: value[-1] for name, value in trainer._metrics["train"].items()}


def by_trl(name: str, tokens: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """The mean loss as TRL computes it."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    kind, settings = name.partition(",")[0], SETTINGS[name]
    beta, smoothing = settings["beta"], settings.get("label_smoothing", 0.0)
    mean = (tokens.sum(-1) / mask.sum(-1)).chunk(2)
    self = types.SimpleNamespace(
        beta=beta,
        label_smoothing=smoothing,
        alpha=0.0,
        loss_type=kind,
        simpo_gamma=settings.get("simpo_gamma"),
        accelerator=_Accelerator(),
    )
    if kind == "simpo":
        return CPOTrainer.cpo_loss(self, *mean)[0].mean()
    if kind == "orpo":
        return (-mean[0] - ORPOTrainer.odds_ratio_loss(self, *mean)[0]).mean()
    if kind == "sigmoid" and smoothing:
        # DPOTrainer has lost cDPO; CPO has it, and the two differ by the reference alone.
        return CPOTrainer.cpo_loss(self, *(tokens.sum(-1) - ref).chunk(2))[0].mean()
    loss, _ = by_dpo_trainer(
        tokens, mask, ref, loss_types=[kind], beta=beta, label_smoothing=smoothing
    )
    return loss


SETTINGS: dict[str, dict[str, float]] = {
    "sigmoid": {"beta": 0.2},
    "sigmoid, smoothed": {"beta": 0.1, "label_smoothing": 0.2},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.1},
    "robust": {"beta": 0.2, "label_smoothing": 0.1},
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.7},
}


def drawn_log_probs(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Log-probabilities ``[2B, L]`` of tokens, their mask, and those of a reference ``[2B]``."""
    length = 30
    counts = rng.integers(1, length + 1, 2 * PAIRS)
    mask = torch.tensor(np.arange(length) < counts[:, None]).long()
    drawn = torch.tensor(-rng.exponential(2.0, (2 * PAIRS, length)), dtype=torch.float32)
    tokens = (drawn * mask).requires_grad_()
    noise = torch.tensor(rng.normal(0, 4, 2 * PAIRS), dtype=torch.float32)
    return tokens, mask, tokens.detach().sum(-1) + noise


@pytest.mark.parametrize("name", SETTINGS)
def test_value_and_gradient_equal_trl(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokens, mask, reference = drawn_log_probs(rng)
    theirs = by_trl(name, tokens, mask, reference)
    [slopes] = torch.autograd.grad(theirs, tokens)

    def by_pair(x: torch.Tensor) -> jax.Array:
        return jnp.asarray(x.detach().numpy().reshape(2, PAIRS).T, jnp.float32)

    def mean(policy: jax.Array) -> jax.Array:
        kind = name.partition(",")[0]
        terms = preference_losses(
            policy, by_pair(reference), by_pair(mask.sum(-1)), loss=kind, **SETTINGS[name]
        )
        return jnp.mean(terms)

    ours, gradient = jax.value_and_grad(mean)(by_pair(tokens.sum(-1)))
    np.testing.assert_allclose(ours, theirs.item(), **CLOSE)
    # The slope is the same at every token of an answer; the first is always one.
    np.testing.assert_allclose(gradient, by_pair(slopes[:, 0]), **CLOSE)


def test_metrics_equal_trl(rng: np.random.Generator, toy: Toy, draw_rows: Drawer) -> None:
    batch = draw_rows(PAIRS, 12, pairs=True)
    logps, counts = jax.jit(partial(sequence_log_probs, toy))(batch)
    logps, counts = (torch.tensor(np.asarray(x)).T.reshape(-1) for x in (logps, counts))
    reference = torch.tensor(batch["reference_logps"]).T.reshape(-1)
    mask = torch.tensor(np.arange(12) < counts.numpy()[:, None]).long()
    tokens = mask * (logps / counts)[:, None]
    loss, theirs = by_dpo_trainer(tokens, mask, reference, loss_types=["sigmoid"], beta=0.3)
    total, pairs, sums = jax.jit(partial(dpo_loss, toy, beta=0.3))(batch)
    ours = {key: float(value) / PAIRS for key, value in sums.items()}
    assert float(pairs) == PAIRS
    np.testing.assert_allclose(float(total) / PAIRS, loss.item(), **CLOSE)
    for mine, name in {
        "rewards_chosen": "rewards/chosen",
        "rewards_rejected": "rewards/rejected",
        "rewards_margin": "rewards/margins",
        "rewards_accuracy": "rewards/accuracies",
        "logps_chosen": "logps/chosen",
        "logps_rejected": "logps/rejected",
    }.items():
        np.testing.assert_allclose(ours[mine], theirs[name], **CLOSE)
    means = (logps / counts).numpy()
    np.testing.assert_allclose(ours["chosen_likelier"], np.mean(means[:PAIRS] > means[PAIRS:]))
    drift = ((logps - reference) / counts).numpy().reshape(2, PAIRS).mean(0)
    np.testing.assert_allclose(ours["kl_per_token"], np.mean(np.expm1(-drift) + drift), rtol=1e-4)


def test_policy_that_is_the_reference_has_no_margin_and_no_divergence(
    toy: Toy, draw_rows: Drawer
) -> None:
    batch = draw_rows(PAIRS, 12, pairs=True)
    measured = jax.jit(partial(dpo_loss, toy))
    assert float(measured(batch)[2]["kl_per_token"]) > 0
    batch["reference_logps"] = np.asarray(jax.jit(partial(sequence_log_probs, toy))(batch)[0])
    total, pairs, sums = measured(batch)
    np.testing.assert_allclose(total / pairs, np.log(2), rtol=1e-6)
    for name in ("rewards_chosen", "rewards_margin", "rewards_accuracy", "kl_per_token"):
        assert float(sums[name]) == 0.0, name


def measure(toy: Toy, loss: str) -> Callable[[Batch], Any]:
    """Loss sum, weight, metrics and the sum's gradient of a batch."""
    graphdef, params = nnx.split(toy, nnx.Param)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_values(params: Any, batch: Any) -> Any:
        total, weight, metrics = dpo_loss(nnx.merge(graphdef, params), batch, loss=loss, beta=0.3)
        return total, (total, weight, metrics)

    return lambda batch: jax.tree.leaves(gradient_and_values(params, batch))


def assert_close(ours: Any, theirs: Any) -> None:
    # Gradients are sums of a few hundred terms of order one.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("loss", LOSSES)
def test_any_cut_adds_up_and_empty_rows_weigh_nothing(
    loss: str, toy: Toy, draw_rows: Drawer, rng: np.random.Generator
) -> None:
    batch = draw_rows(PAIRS, 12, pairs=True)
    measured = measure(toy, loss)
    cut = int(rng.integers(1, PAIRS))
    parts = [{k: v[:cut] for k, v in batch.items()}, {k: v[cut:] for k, v in batch.items()}]
    # Filled up to one shape, as the last micro-batches of a data set are.
    filled = [with_empty_rows(part, PAIRS - len(part["input_ids"])) for part in parts]
    assert_close([a + b for a, b in zip(*map(measured, filled), strict=True)], measured(batch))
    nothing = measured({k: np.zeros_like(v) for k, v in batch.items()})
    assert all(np.all(leaf == 0) for leaf in nothing)


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_log_probabilities_give_finite_losses_and_gradients(loss: str) -> None:
    policy = jnp.array([[-1e4, -1e-9], [-1e-9, -1e4], [0.0, 0.0]])
    value, slope = jax.value_and_grad(
        lambda policy: jnp.sum(
            preference_losses(policy, jnp.flip(policy), jnp.ones((3, 2)), loss=loss)
        )
    )(policy)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_missing_reference_and_unknown_loss_are_refused(toy: Toy, draw_rows: Drawer) -> None:
    batch = draw_rows(2, 8, pairs=True)
    del batch["reference_logps"]
    for loss in LOSSES:
        if loss in REFERENCE_FREE:
            assert "kl_per_token" not in jax.eval_shape(partial(dpo_loss, toy, loss=loss), batch)[2]
        else:
            with pytest.raises(ValueError, match="reference_logps is missing"):
                dpo_loss(toy, batch, loss=loss)
    with pytest.raises(ValueError, match=r"sigmoid, ipo, .* got 'kto'"):
        preference_losses(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2)), loss="kto")

r"""Preference losses on pairs: DPO and its kin.

With policy log-probabilities :math:`\pi`, reference log-probabilities :math:`\rho`, the log-ratio
difference is :math:`h = (\pi_c - \pi_r) - (\rho_c - \rho_r)` and a reward is
:math:`\beta(\pi - \rho)`.

=========  ==========================================================================  ============
loss       per pair                                                                    source
=========  ==========================================================================  ============
sigmoid    −(1−ε) log σ(βh) − ε log σ(−βh)                                             2305.18290
ipo        (h̄ − 1/(2β))², h̄ from log-probabilities per token                          2310.12036
hinge      max(0, 1 − βh)                                                              2305.10425
robust     (−(1−ε) log σ(βh) + ε log σ(−βh)) / (1 − 2ε)                                2403.00409
orpo       −π̄_c − β log σ(log odds(π̄_c) − log odds(π̄_r)), π̄ per token               2403.07691
simpo      −log σ(β(π̄_c − π̄_r) − γ), π̄ per token                                     2405.14734
=========  ==========================================================================  ============

The last two need no reference model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.objectives.cross_entropy import Batch, by_share, sequence_log_probs

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "orpo", "simpo")
REFERENCE_FREE = ("orpo", "simpo")


def preference_losses(
    policy: jax.Array,
    reference: jax.Array,
    counts: jax.Array,
    *,
    loss: str = "sigmoid",
    beta: float = 0.2,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
) -> jax.Array:
    """The loss of each pair.

    Args:
      policy: float32 ``[B, 2]``, log-probabilities of chosen and rejected answers.
      reference: float32 ``[B, 2]``, the same by the reference model; ignored by orpo and simpo.
      counts: float32 ``[B, 2]``, tokens of each answer.
      loss: one of `LOSSES`.
      beta: inverse temperature (orpo: weight of the odds-ratio term).
      label_smoothing: ε, the probability that a label is flipped (sigmoid, robust).
      simpo_gamma: γ, SimPO's target margin.

    Returns:
      float32 ``[B]``.

    Raises:
      ValueError: an unknown loss.
    """
    per_token = policy / jnp.maximum(counts, 1.0)
    difference = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    for_it = jax.nn.log_sigmoid(beta * difference)
    against = jax.nn.log_sigmoid(-beta * difference)
    if loss == "sigmoid":
        return -(1 - label_smoothing) * for_it - label_smoothing * against
    if loss == "robust":
        return (-(1 - label_smoothing) * for_it + label_smoothing * against) / (
            1 - 2 * label_smoothing
        )
    if loss == "hinge":
        return jax.nn.relu(1 - beta * difference)
    if loss == "ipo":
        ratios = per_token - reference / jnp.maximum(counts, 1.0)
        return jnp.square(ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta))
    if loss == "simpo":
        return -jax.nn.log_sigmoid(beta * (per_token[:, 0] - per_token[:, 1]) - simpo_gamma)
    if loss == "orpo":
        # A probability that rounds to 1 has no odds; 1e-7 is one float32 unit below it.
        safe = jnp.minimum(per_token, -1e-7)
        odds = safe - jnp.log(-jnp.expm1(safe))
        return -per_token[:, 0] - beta * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")


def dpo_loss(
    model: Any,
    batch: Batch,
    *,
    loss: str = "sigmoid",
    beta: float = 0.2,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    chunk_size: int = 512,
    per_row: bool = False,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """A preference loss over a batch of pairs; the weight is the number of pairs.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, 2, T]`` (chosen, rejected) and ``reference_logps`` float32 ``[B, 2]``,
        which orpo and simpo do not need; perhaps ``row_share``. Empty rows, as they fill up a last
        batch, do not count.
      loss: see :func:`preference_losses`, as for the arguments after it.
      beta: inverse temperature.
      label_smoothing: probability that a label is flipped.
      simpo_gamma: SimPO's target margin.
      chunk_size: positions of each row whose logits exist at a time.
      per_row: also give each pair's loss, ``row_loss`` and ``row_weight``, float32 ``[B]``.

    Returns:
      (loss sum, pairs, sums of: rewards of chosen and rejected answers, their margin and how often
      it is positive, log-probabilities, how often the chosen answer is the likelier one per token,
      and an estimate of the policy's KL divergence from the reference on the answers, in nats).

    Raises:
      ValueError: a loss with a reference model, and no ``reference_logps``.
    """
    policy, counts = sequence_log_probs(model, batch, chunk_size)
    reference = batch.get("reference_logps")
    if reference is None:
        if loss not in REFERENCE_FREE:
            raise ValueError(f"batch: reference_logps is missing, which the loss {loss!r} needs")
        reference = jnp.zeros_like(policy)
    losses = preference_losses(
        policy,
        reference,
        counts,
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
    )
    valid = jnp.all(counts > 0, axis=-1)
    per_token = policy / jnp.maximum(counts, 1.0)
    scores = per_token if loss in REFERENCE_FREE else policy - reference
    rewards = jax.lax.stop_gradient(beta * scores)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, jax.lax.stop_gradient(values), 0.0))

    metrics = {
        "rewards_chosen": total(rewards[:, 0]),
        "rewards_rejected": total(rewards[:, 1]),
        "rewards_margin": total(rewards[:, 0] - rewards[:, 1]),
        "rewards_accuracy": total((rewards[:, 0] > rewards[:, 1]).astype(jnp.float32)),
        "logps_chosen": total(policy[:, 0]),
        "logps_rejected": total(policy[:, 1]),
        "chosen_likelier": total((per_token[:, 0] > per_token[:, 1]).astype(jnp.float32)),
    }
    if loss not in REFERENCE_FREE:
        # k3 estimator on the data's own answers: exp(-d) - 1 + d is never negative.
        d = jnp.clip(
            jnp.mean((policy - reference) / jnp.maximum(counts, 1.0), axis=-1), -20.0, 20.0
        )
        metrics["kl_per_token"] = total(jnp.expm1(-d) + d)
    losses = jnp.where(valid, losses, 0.0)
    if per_row:
        metrics |= {"row_loss": losses, "row_weight": valid.astype(jnp.float32)}
    return jnp.sum(by_share(losses, batch)), jnp.sum(valid, dtype=jnp.float32), metrics

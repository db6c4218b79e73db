"""A reference batch in every step: what a step with them computes, against NumPy in float64."""

import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax.config import RunConfig, load_config
from ogpsa_jax.errors import InputError
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.step import Network, TrainState, make_train_step

SIZE = 6


class Linear(nnx.Module):
    def __init__(self, values):
        self.w = nnx.Param(jnp.asarray(values, jnp.float32))


def objective(model, batch):
    """Squared error, weighted by its number of rows."""
    errors = batch["x"] @ model.w[...] - batch["y"]
    return jnp.sum(errors**2), jnp.asarray(len(batch["y"]), jnp.float32), {}


def gradient(w, batch):
    """Of the mean over all rows of the batch."""
    x, y = batch["x"].reshape(-1, SIZE).astype(float), batch["y"].reshape(-1).astype(float)
    return 2 * x.T @ (x @ w - y) / len(y)


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def draw(rng, micro, rows):
    return {
        "x": rng.standard_normal((micro, rows, SIZE)).astype(np.float32),
        "y": rng.standard_normal((micro, rows)).astype(np.float32),
    }


def run(w, steps, *, rank, window, replay_weight, project_momentum=False):
    """Parameters after SGD-like steps: Adam would hide a factor, so look at its first moment."""
    config = RunConfig.model_validate(
        {
            "references": {
                "sets": [{"path": "unused"}],
                "in_step": {"window": window, "replay_weight": replay_weight},
            },
            "ogpsa": {
                "preset": "in-step",
                "rank": rank,
                "project_momentum": project_momentum,
            },
            "optimizer": {"schedule": "constant", "max_grad_norm": None, "learning_rate": 1e-3},
        }
    )
    network = Network.of(Linear(w))
    optimizer = make_optimizer(config, len(steps))
    step = make_train_step(network.graphdef, objective, optimizer, reference_loss=objective)
    state = TrainState(network.trained, optimizer.init(network.trained))
    metrics = {}
    for batch, references in steps:
        state, metrics = step(state, {}, batch, references)
    return state, metrics


def first_moment(state):
    moments = [
        x.mu
        for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(x, "mu")
    ]
    return np.asarray(moments[0]["w"], np.float64)


@pytest.mark.parametrize("replay_weight", [0.0, 0.5])
def test_the_step_projects_with_its_own_references_and_replays_them(rng, replay_weight):
    w = rng.standard_normal(SIZE).astype(np.float32)
    batch, references = draw(rng, 2, 3), draw(rng, 1, 4)
    state, metrics = run(w, [(batch, references)], rank=1, window=1, replay_weight=replay_weight)
    g, r = gradient(w, batch), gradient(w, references)
    q = r / np.linalg.norm(r)
    expected = 0.1 * (g - q * (q @ g) + replay_weight * r)  # 0.1 = 1 - beta_1
    np.testing.assert_allclose(first_moment(state), expected, atol=1e-6 * np.linalg.norm(g + r))
    mean = np.mean((references["x"][0] @ w - references["y"][0]) ** 2)
    np.testing.assert_allclose(metrics["reference/loss"], mean, rtol=1e-5)


def test_a_window_within_the_rank_remembers_that_many_steps(rng):
    w = rng.standard_normal(SIZE).astype(np.float32)
    steps = [(draw(rng, 1, 3), draw(rng, 1, 3)) for _ in range(3)]
    # Learning rate 1e-3: the weights hardly move, so gradients at the first ones will do.
    state, metrics = run(w, steps, rank=3, window=2, replay_weight=0.0)
    assert metrics["effective_rank"] == 2
    kept = np.stack([gradient(w, references) for _, references in steps[1:]], axis=1)
    basis = np.stack([np.asarray(b["w"]) for b in state.opt_state[0].basis], axis=1)
    q, _ = np.linalg.qr(kept)
    outside = basis - q @ (q.T @ basis)
    assert np.abs(outside).max() < 0.05 < np.abs(basis).max()


def test_the_cut_into_micro_batches_does_not_matter(rng):
    w = rng.standard_normal(SIZE).astype(np.float32)
    steps = [(draw(rng, 2, 4), draw(rng, 2, 2)) for _ in range(3)]
    whole = [
        tuple({k: v.reshape(1, -1, *v.shape[2:]) for k, v in part.items()} for part in step)
        for step in steps
    ]
    settings = {"rank": 2, "window": 2, "replay_weight": 0.5, "project_momentum": True}
    cut, told = run(w, steps, **settings)
    uncut, _ = run(w, whole, **settings)
    assert told["steps_since_refresh"] == 1
    np.testing.assert_allclose(cut.params["w"], uncut.params["w"], atol=2e-6)


def test_metrics_of_a_step_are_those_of_all_its_micro_batches():
    w = np.zeros(SIZE, np.float32)
    axis = np.eye(SIZE, dtype=np.float32)[:1]
    useful, filler = {"x": axis, "y": np.ones(1)}, {"x": 0 * axis, "y": np.zeros(1)}
    batch = jax.tree.map(lambda *x: np.stack(x).astype(np.float32), useful, useful, filler)
    references = jax.tree.map(lambda x: x[None].astype(np.float32), useful)
    _, metrics = run(w, [(batch, references)], rank=1, window=1, replay_weight=0.0)
    for name in ("removed_fraction", "in_span_fraction", "steps_since_refresh"):
        assert metrics[name] == pytest.approx(1), name


def test_projecting_momentum_keeps_the_first_moment_out_of_the_newest_references(rng):
    w = rng.standard_normal(SIZE).astype(np.float32)
    steps = [(draw(rng, 1, 3), draw(rng, 1, 3)) for _ in range(4)]
    overlaps = {}
    for projects in (False, True):
        state, _ = run(w, steps, rank=1, window=1, replay_weight=0.0, project_momentum=projects)
        q, moment = np.asarray(state.opt_state[0].basis[0]["w"]), first_moment(state)
        overlaps[projects] = abs(q @ moment) / np.linalg.norm(moment)
    assert overlaps[True] < 1e-5 < overlaps[False]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("references.in_step={share: 0.01}", "must leave at least one row on both sides"),
        ("ogpsa.placement=update", "a projected update cannot keep the replayed gradient"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, told):
    with pytest.raises(InputError, match=told):
        load_config(
            "configs/smoke-sft.yaml",
            ["ogpsa.preset=in-step", "references.in_step={replay_weight: 0.5}", override],
        )

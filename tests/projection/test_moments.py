"""Every optimizer of Optax: after a refresh, no gradient of the past is left along the references.

Their steps are measured where the references have their entries, at the first row of a matrix and
the first entries of a vector: Adam's scaling of every entry, Muon's of whole matrices and the signs
of Lion leave a step that is zero there so.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from optax._src import alias

from ogpsa_jax import diagnostics, ogpsa_project, refresh
from ogpsa_jax.projection.moments import IMPOSSIBLE, is_moment

SHAPES = {"b": (5,), "w": (4, 3)}
RANK = 3
AT = {"b": np.s_[:RANK], "w": np.s_[0]}  # the entries that the references have


@pytest.fixture(autouse=True)
def as_optax_runs(strict):
    """Optax's optimizers promote dtypes and ranks, and some warn when they are made."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


WRAPPED = {
    "apply_every": lambda: optax.chain(optax.adam(0.1), optax.apply_every(2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "partition": lambda: optax.partition(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, 0.9)}, {"b": "adam", "w": "sgd"}
    ),
    "sgd with momentum": lambda: optax.sgd(0.1, 0.9),
    "sgd with Nesterov's momentum": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "rmsprop with momentum": lambda: optax.rmsprop(0.1, momentum=0.9),
    "rmsprop, centered": lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    "adafactor with momentum": lambda: optax.adafactor(0.1, momentum=0.9, min_dim_size_to_factor=2),
    "lbfgs without search": lambda: optax.lbfgs(0.1, linesearch=None),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1, 0.9)),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=4),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(optax.adam(0.1)),
}
NOT_POSSIBLE = {
    *("cocob", "galore", "lbfgs without search", "madgrad", "mechanize", "sam"),
    *("schedule_free", "schedule_free_adamw", "schedule_free_sgd"),
}


def optimizers():
    """All of Optax, and of its contributions, that are made from a learning rate; and wrappers."""
    made = dict(WRAPPED)
    for module in (alias, optax.contrib):
        for name, make in vars(module).items():
            if name.startswith(("_", "scale_by")) or not inspect.isfunction(make):
                continue
            given = inspect.signature(make).parameters
            # The three are above, or project the gradients of single rows.
            if "learning_rate" not in given or name in ("schedule_free", "lbfgs", "dpsgd"):
                continue
            settings = {"learning_rate": 0.1, "weight_decay": 0.0, "min_dim_size_to_factor": 2}
            settings |= {"galore": {"rank": 2}, "noisy_sgd": {"key": 0, "eta": 0.0}}.get(name, {})
            known = {key: value for key, value in settings.items() if key in given}
            made[name] = partial(make, **known)
    return made


OPTIMIZERS = optimizers()
EXTRA = {
    "momo": {"value": jnp.asarray(100.0)},
    "momo_adam": {"value": jnp.asarray(100.0)},
    "sophia": {"obj_fn": lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))},
}


def tree(rng):
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


def references():
    out = []
    for j in range(RANK):
        leaves = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        for name, at in AT.items():
            leaves[name][at][j] = 1.0
        out.append(jax.tree.map(jnp.asarray, leaves))
    return out


def share(step):
    """The share of a step's norm that lies along the references."""
    inside = sum(float(jnp.sum(jnp.square(step[name][at]))) for name, at in AT.items())
    return (inside / sum(float(jnp.sum(jnp.square(leaf))) for leaf in step.values())) ** 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_after_a_refresh_has_nothing_left_of_the_past_or_is_refused(name, rng):
    tx = optax.chain(ogpsa_project(RANK), optax.with_extra_args_support(OPTIMIZERS[name]()))
    params = tree(rng)
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(tree(rng), state, params, **EXTRA.get(name, {}))
        params = optax.apply_updates(params, updates)
    if name in NOT_POSSIBLE:
        with pytest.raises(ValueError, match=r"project_momentum: the steps of \w+ .*opt_state.*1"):
            refresh(state, references(), project_momentum=True)
        left = refresh(state, references(), project_momentum={r"\[1\]": False})
        assert not int(diagnostics(left)["projected_moments"])
        return
    # Weight decay, which some cannot do without, has nothing to do there.
    params = {name: leaf.at[AT[name]].set(0.0) for name, leaf in params.items()}
    gradient = tree(rng)
    steps, moments = [], []
    for momentum in (False, True):
        new = refresh(state, references(), project_momentum=momentum)
        moments.append(int(diagnostics(new)["projected_moments"]))
        updates, _ = tx.update(gradient, new, params, **EXTRA.get(name, {}))
        steps.append(updates)
    assert not moments[0]
    assert share(steps[1]) < 1e-6
    # Of acprop, the gradient alone is divided by what the past says.
    assert (share(steps[0]) > 0.1) == (moments[1] > 0) or name == "acprop"


def fields(node, params):
    """``(type, field, tree)`` of all in a state that is shaped like the parameters."""
    if hasattr(node, "_fields"):
        for field in node._fields:
            value = getattr(node, field)
            if jax.tree.structure(value) != jax.tree.structure(params):
                yield from fields(value, params)
            elif jax.tree.map(jnp.shape, value) == jax.tree.map(jnp.shape, params):
                yield type(node), field, value
    elif isinstance(node, tuple | list | dict):
        for value in node.values() if isinstance(node, dict) else node:
            yield from fields(value, params)


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"partition"}))
def test_moments_are_what_changes_its_sign_with_the_gradients(name, rng):
    tx = optax.with_extra_args_support(OPTIMIZERS[name]())
    params, gradients = tree(rng), [tree(rng) for _ in range(4)]
    ends = []
    for sign in (1.0, -1.0):
        state = tx.init(params)
        for gradient in gradients:
            signed = jax.tree.map(lambda leaf, sign=sign: sign * leaf, gradient)
            _, state = tx.update(signed, state, params, **EXTRA.get(name, {}))
        ends.append(list(fields(state, params)))
    for (owner, field, one), (_, _, other) in zip(*ends, strict=True):
        if owner.__name__ in IMPOSSIBLE:
            continue
        # Of a small leaf all may be zero: Rprop forgets entries whose sign has changed.
        odd = any(np.any(x) for x in jax.tree.leaves(one)) and all(
            np.allclose(x, -y, rtol=0, atol=1e-4 * np.max(np.abs(x)))
            for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        )
        # Sums that only set the size of steps, and a mean that is part of a variance.
        if (owner.__name__, field) in {
            ("ProdigyState", "grad_sum"),
            ("DAdaptAdamWState", "grad_sum"),
            ("ScaleByRStdDevState", "mu"),
            ("ScaleByRStdDevWithCountState", "mu"),
        }:
            assert odd
            assert is_moment(owner, field) is False
        else:
            assert is_moment(owner, field) is odd, (owner, field)

"""What a subspace of inputs cannot be made of is named, at once."""

import pytest

from ogpsa_jax import (
    Kernel,
    SecondMoment,
    ogpsa_project,
    refresh,
)

from .input_helpers import KERNELS, inputs_of, moments_of, transformation, tree

WRONG = {
    "energy": ({"energy": 0.0}, "energy must lie in"),
    "no kernels": ({"kernels": None}, "kernels: subspace='inputs' needs"),
    "rule": ({"rule": "conflict"}, "'conflict' needs"),
    "others": ({"others": "melt"}, "others must be"),
    "rank": ({"rank": 0}, "rank must be"),
    "subspace": ({"subspace": "columns"}, "subspace must be"),
    "energy with gradients": (
        {"subspace": "gradients", "kernels": None, "energy": 0.9},
        "need subspace='inputs'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be(name):
    settings, message = WRONG[name]
    settings = {"rank": 2, "subspace": "inputs", "kernels": KERNELS, **settings}
    with pytest.raises(ValueError, match=message):
        ogpsa_project(**settings)


def test_moments_that_do_not_fit_are_named(rng):
    gradient, moments = tree(rng), moments_of(inputs_of(rng))
    state = transformation().init(gradient)
    without = {name: moment for name, moment in moments.items() if name != "attention"}
    with pytest.raises(ValueError, match=r"moments: those of 'attention'.* are missing"):
        refresh(state, moments=without)
    swapped = {**moments, "attention": moments["output"]}
    with pytest.raises(ValueError, match=r"'attention' have shape \(2, 15, 15\)"):
        refresh(state, moments=swapped)
    with pytest.raises(
        ValueError, match=r"'attention' is a .*make it with second_moment\(inputs\)"
    ):
        refresh(state, moments={**moments, "attention": moments["attention"].product})
    whole = moments["dense"]
    part = SecondMoment(whole.product[:, :3], whole.trace)
    with pytest.raises(ValueError, match="neither whole nor a sketch"):
        refresh(state, moments={**moments, "dense": part})
    with pytest.raises(ValueError, match="expected reference gradients, or moments"):
        refresh(state)
    with pytest.raises(ValueError, match="pass moments="):
        refresh(state, [gradient])
    with pytest.raises(ValueError, match="no subspace of inputs"):
        refresh(ogpsa_project(1).init(gradient), moments=moments)


def test_kernels_that_do_not_fit_are_named(rng):
    params = tree(rng)
    for kernels, message in (
        ({"nothing": Kernel()}, "no leaf of the parameters is a matrix"),
        ({"bias": Kernel()}, "axes .* given for .*bias"),
        ({"dense": Kernel(axes=(0, 1))}, "needs an input axis, an output axis"),
        ({"dense|embedding": Kernel("same")}, "both said to multiply 'same'"),
    ):
        with pytest.raises(ValueError, match=message):
            ogpsa_project(2, subspace="inputs", kernels=kernels).init(params)


def test_a_tree_of_another_shape_is_refused(rng):
    params = tree(rng)
    state = transformation().init(params)
    with pytest.raises(ValueError, match="leaves"):
        transformation().update({"dense": params["dense"]}, state)
    other = {**params, "dense": params["dense"].T}
    with pytest.raises(ValueError, match="a leaf of shape"):
        transformation().update(other, state)

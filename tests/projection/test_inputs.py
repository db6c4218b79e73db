"""Subspaces of inputs: what NumPy says of them in float64, and every way in which they can fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogpsa_jax import (
    InputState,
    Kernel,
    SecondMoment,
    column_adamw,
    diagnostics,
    flax_kernels,
    gradient_moments,
    input_moments,
    ogpsa,
    ogpsa_project,
    reference_gradients,
    refresh,
    second_moment,
)

from .helpers import assert_close

# A dense kernel, two that share inputs in every layer, one with two input axes, and the rest.
SHAPES = {
    "dense": (6, 5),
    "layers": {"q": (3, 7, 4), "v": (3, 7, 2), "o": (2, 3, 5, 8)},
    "embedding": (9, 6),
    "bias": (5,),
}
KERNELS = {
    "dense": Kernel(),
    r"\['(q|v)'\]": Kernel("attention", stacked=(0,)),
    r"\['o'\]": Kernel("output", axes=(1, 2), stacked=(0,)),
}
WIDTHS = {"dense": (6,), "attention": (3, 7), "output": (2, 15)}


def tree(rng, dtype=jnp.float32, scale=1.0):
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def inputs_of(rng, count=4, scale=1.0):
    """Inputs ``[..., count, in]`` of every kernel, float64.

    Their singular values are apart, so that a leading eigenvector is known to some float32 units:
    an error of one unit turns it by that over the gap of the squares, a tenth here.
    """

    def draw(shape):
        x = rng.standard_normal((*shape[:-1], count, shape[-1]))
        left, values, right = np.linalg.svd(x, full_matrices=False)
        return scale * (left * np.linspace(1.0, 0.4, values.shape[-1])) @ right

    return {name: draw(shape) for name, shape in WIDTHS.items()}


def moments_of(inputs, **settings):
    def one(x):
        fn = lambda x: second_moment(x, **settings)  # noqa: E731
        for _ in range(x.ndim - 2):
            fn = jax.vmap(fn)
        return fn(jnp.asarray(x, jnp.float32))

    return {name: one(x) for name, x in inputs.items()}


def transformation(rank=20, **settings):
    return ogpsa_project(rank, subspace="inputs", kernels=KERNELS, **settings)


def exact_basis(x, energy=1.0):
    """The leading eigenvectors that hold the share, by float64 eigen-decomposition."""
    values, vectors = np.linalg.eigh(x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int(np.sum(np.cumsum(values) - values < energy * np.sum(values) * (1 - 1e-12)))
    return vectors[:, : min(count, np.linalg.matrix_rank(x))]


def exact(gradient, inputs, energy=1.0):
    """The projected gradient in float64; leaves that are no matrices zero."""
    out = jax.tree.map(lambda g: np.zeros(g.shape), gradient)

    def off(g, x):
        u = exact_basis(x, energy)
        return g - u @ (u.T @ g)

    def wide(leaf):
        return np.asarray(leaf, np.float64)

    out["dense"] = off(wide(gradient["dense"]), inputs["dense"])
    for name in ("q", "v"):
        g = wide(gradient["layers"][name])
        out["layers"][name] = np.stack([off(g[i], inputs["attention"][i]) for i in range(3)])
    g = wide(gradient["layers"]["o"]).reshape(2, 15, 8)
    off_o = np.stack([off(g[i], inputs["output"][i]) for i in range(2)])
    out["layers"]["o"] = off_o.reshape(SHAPES["layers"]["o"])
    return out


def assert_orthogonal_to_inputs(updates, inputs, tolerance=1e-5):
    """No reference input sees the step: ``xᵀ ΔW`` is round-off."""
    pairs = [(updates["dense"], inputs["dense"])]
    pairs += [
        (updates["layers"][n][i], inputs["attention"][i]) for n in ("q", "v") for i in range(3)
    ]
    pairs += [(updates["layers"]["o"][i].reshape(15, 8), inputs["output"][i]) for i in range(2)]
    for w, x in pairs:
        w = np.asarray(w, np.float64)
        change = x @ w
        assert np.linalg.norm(change) <= tolerance * np.linalg.norm(x) * np.linalg.norm(w)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_equals_float64(rng, scale, energy):
    inputs, gradient = inputs_of(rng, scale=scale), tree(rng)
    tx = transformation(energy=energy)
    state = jax.jit(refresh)(tx.init(gradient), moments=moments_of(inputs))
    updates, state = jax.jit(tx.update)(gradient, state)
    assert_close(updates, exact(gradient, inputs, energy), 2e-6)


def test_no_reference_input_sees_the_step_and_projecting_twice_changes_nothing(rng):
    inputs, gradient = inputs_of(rng), tree(rng)
    tx = transformation(energy=1.0)
    state = refresh(tx.init(gradient), moments=moments_of(inputs))
    once, state = jax.jit(tx.update)(gradient, state)
    assert_orthogonal_to_inputs(once, inputs)
    twice, _ = jax.jit(tx.update)(once, state)
    assert_close(twice, once, 1e-6)


def test_inplane_is_what_orthogonal_removes(rng):
    inputs, gradient = inputs_of(rng), tree(rng)
    parts = []
    for rule in ("orthogonal", "inplane", "none"):
        tx = transformation(rule=rule, others="leave")
        state = refresh(tx.init(gradient), moments=moments_of(inputs))
        updates, _ = jax.jit(tx.update)(gradient, state)
        parts.append(updates)
    for name in ("dense",):
        assert_close(parts[0][name] + parts[1][name], parts[2][name])
    assert_close(parts[2], gradient, 0)


def test_the_basis_is_orthonormal_and_the_shares_are_right(rng):
    inputs = inputs_of(rng, count=12)
    tx = transformation(energy=0.8)
    state = refresh(tx.init(tree(rng)), moments=moments_of(inputs))
    for name, x in inputs.items():
        x = x.reshape(-1, *x.shape[-2:])
        u = np.asarray(state.basis[name], np.float64).reshape(len(x), x.shape[-1], -1)
        group = diagnostics(state)["groups"][name]
        ranks = np.asarray(group["effective_rank"]).reshape(-1)
        held = np.asarray(group["reference_coverage"]).reshape(-1)
        for i in range(len(x)):
            present = np.diag((np.arange(u.shape[-1]) < ranks[i]).astype(float))
            np.testing.assert_allclose(u[i].T @ u[i], present, atol=1e-6)
            share = np.sum((x[i] @ u[i]) ** 2) / np.sum(x[i] ** 2)
            np.testing.assert_allclose(held[i], share, atol=1e-5)
            assert share >= 0.8
            assert ranks[i] == exact_basis(x[i], 0.8).shape[1]


def test_a_cap_below_the_energy_is_told_with_the_share_that_is_held(rng):
    inputs = inputs_of(rng, count=12)
    tx = transformation(rank=2, energy=0.99)
    state = refresh(tx.init(tree(rng)), moments=moments_of(inputs))
    x = inputs["dense"]
    u = exact_basis(x)[:, :2]
    found = diagnostics(state)["groups"]["dense"]
    share = np.sum((x @ u) ** 2) / np.sum(x**2)
    np.testing.assert_allclose(found["reference_coverage"], share, atol=1e-5)
    assert share < 0.99
    np.testing.assert_allclose(found["dimension_fraction"], 2 / 6)
    assert state.basis["attention"].shape == (3, 7, 2)


def test_a_sketch_states_its_error(rng):
    """Of a spectrum that decays a sketch holds nearly all, and never claims more than it has."""
    width, rows = 60, 400
    spectrum = 10.0 ** -np.linspace(0, 6, width)
    turn, _ = np.linalg.qr(rng.standard_normal((width, width)))
    x = (rng.standard_normal((rows, width)) * spectrum) @ turn.T
    params = {"dense": jnp.zeros((width, 3))}
    tx = ogpsa_project(8, subspace="inputs", energy=1.0, kernels={"dense": Kernel()})
    claimed, true = {}, {}
    for size in (None, 16):
        moment = second_moment(jnp.asarray(x, jnp.float32), size=size, seed=int(rng.integers(99)))
        if size is not None:
            assert moment.product.shape == (width, size)
        state = jax.jit(refresh)(tx.init(params), moments={"dense": moment})
        u = np.asarray(state.basis["dense"], np.float64)
        np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-6)
        claimed[size] = float(diagnostics(state)["reference_coverage"])
        true[size] = np.sum((x @ u) ** 2) / np.sum(x**2)
        assert claimed[size] <= true[size] + 1e-5
    # Expected error of the approximation (Tropp et al., theorem 4.1): (1 + 8 / (16 - 8 - 1)) of
    # what eight directions leave; here twice that.
    assert true[16] >= 1 - 2 * (1 + 8 / 7) * (1 - true[None])


def test_moments_add_up_over_batches_and_padding_does_not_count(rng):
    x = jnp.asarray(rng.standard_normal((3, 4, 6)), jnp.float32)
    mask = jnp.asarray(rng.integers(2, size=(3, 4)), bool)

    def collect(params, batch):
        return {"dense": second_moment(batch["x"] * params, batch["mask"])}

    found = jax.jit(lambda p, b: input_moments(collect, p, b))(2.0, {"x": x, "mask": mask})
    rows = 2.0 * np.asarray(x, np.float64)[np.asarray(mask)]
    assert_close(found["dense"].product, rows.T @ rows, 1e-6)
    np.testing.assert_allclose(found["dense"].trace, np.sum(rows**2), rtol=1e-6)


def test_gradient_moments_are_of_rows_that_weigh_the_same(rng):
    params = {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    x = rng.standard_normal((5, 6)) * np.array([1, 10, 100, 1e-3, 1])[:, None]
    y = rng.standard_normal((5, 3))

    def loss_fn(params, row):
        return jnp.sum((row["x"] @ params["kernel"] - row["y"]) ** 2)

    rows = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    found = gradient_moments(loss_fn, params, rows, kernels=flax_kernels)["kernel"]
    w = np.asarray(params["kernel"], np.float64)
    total = np.zeros((6, 6))
    for row, target in zip(x, y, strict=True):
        g = np.outer(row, 2 * (row @ w - target))
        g /= np.linalg.norm(g)
        total += g @ g.T
    assert_close(found.product, total, 1e-5)
    np.testing.assert_allclose(found.trace, 5.0, rtol=1e-5)
    sketch = gradient_moments(loss_fn, params, rows, kernels=flax_kernels, size=2)["kernel"]
    assert_close(sketch.product, total @ np.asarray(sketch.test_matrix(), np.float64), 1e-5)


def test_gradient_moments_span_the_inputs(rng):
    """Both sources hold the same subspace where every row is one input."""
    params = {"kernel": jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
    tx = ogpsa_project(8, subspace="inputs", energy=1.0, kernels=flax_kernels)

    def loss_fn(params, row):
        return jnp.sum(jnp.sin(row @ params["kernel"]))

    moments = gradient_moments(loss_fn, params, x, kernels=flax_kernels)
    gradient = {"kernel": jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)}
    projected = []
    for found in (moments, {"kernel": second_moment(x)}):
        state = refresh(tx.init(params), moments=found)
        projected.append(tx.update(gradient, state)[0])
    assert_close(projected[0], projected[1], 2e-5)


def test_reference_losses_do_not_move_at_all_in_a_linear_model(rng):
    """Not only to first order: what no input sees changes nothing, however large the step."""
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 8), (8, 5)))
    tx = ogpsa_project(8, subspace="inputs", energy=1.0, kernels={"w": Kernel()})
    state = refresh(tx.init({"w": w}), moments={"w": second_moment(x)})
    step, _ = tx.update({"w": jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)}, state)
    np.testing.assert_allclose(x @ (w + 100 * step["w"]), x @ w, atol=2e-3)


@pytest.mark.parametrize("placement", ["gradient", "update", "both"])
def test_both_placements_keep_adam_out_of_the_subspace(rng, placement):
    inputs, params = inputs_of(rng), tree(rng)
    tx = ogpsa(
        optax.adamw(0.1, weight_decay=0.01),
        20,
        placement=placement,
        subspace="inputs",
        energy=1.0,
        kernels=KERNELS,
    )
    state = refresh(tx.init(params), moments=moments_of(inputs))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = jax.jit(tx.update)(tree(rng), state, params)
    if placement == "gradient":  # Adam divides by entry, and weight decay shrinks along U
        with pytest.raises(AssertionError):
            assert_orthogonal_to_inputs(updates, inputs, 1e-2)
    else:
        assert_orthogonal_to_inputs(updates, inputs)


def test_column_adamw_commutes_with_the_projection(rng):
    inputs, params = inputs_of(rng), tree(rng)
    tx = optax.chain(transformation(energy=1.0), column_adamw(0.1, kernels=KERNELS))
    state = refresh(tx.init(params), moments=moments_of(inputs))
    for _ in range(3):
        updates, state = jax.jit(tx.update)(tree(rng), state, params)
    assert_orthogonal_to_inputs(updates, inputs)
    nu = state[1][0].nu
    assert nu["dense"].shape == (1, 5)
    assert nu["layers"]["o"].shape == (2, 1, 1, 8)
    assert nu["bias"].shape == (5,)


def test_column_adamw_is_adamw_where_there_is_one_input(rng):
    params = {"w": jnp.asarray(rng.standard_normal((1, 5)), jnp.float32)}
    ours, theirs = column_adamw(0.1, kernels={"w": Kernel()}), optax.adamw(0.1, weight_decay=0.0)
    states = [ours.init(params), theirs.init(params)]
    for _ in range(4):
        gradient = {"w": jnp.asarray(rng.standard_normal((1, 5)), jnp.float32)}
        mine, states[0] = ours.update(gradient, states[0], params)
        with jax.numpy_dtype_promotion("standard"):
            yours, states[1] = theirs.update(gradient, states[1], params)
        assert_close(mine, yours, 2e-5)


def test_others_are_frozen_left_or_projected_off_a_gradient_span(rng):
    inputs, gradient, reference = inputs_of(rng), tree(rng), tree(rng)
    moments = moments_of(inputs)
    frozen, _ = _updated(transformation(), gradient, moments=moments)
    assert not np.any(frozen["bias"])
    assert not np.any(frozen["embedding"])
    left, _ = _updated(transformation(others="leave"), gradient, moments=moments)
    assert_close(left["bias"], gradient["bias"], 0)
    tx = transformation(others="gradients", others_rank=1)
    updates, state = _updated(tx, gradient, [reference], moments=moments)
    for name in ("bias", "embedding"):
        overlap = np.vdot(np.asarray(updates[name]), np.asarray(reference[name]))
        assert abs(overlap) < 1e-5 * np.linalg.norm(reference[name])
    assert_close(updates["dense"], frozen["dense"])
    assert {"['bias']", "attention"} <= set(diagnostics(state)["groups"])


def _updated(tx, gradient, *references, **more):
    state = jax.jit(refresh)(tx.init(gradient), *references, **more)
    return jax.jit(tx.update)(gradient, state)


def test_the_identity_until_the_first_refresh(rng):
    gradient = tree(rng)
    tx = transformation(others="leave")
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert_close(updates, gradient, 0)
    assert float(diagnostics(state)["reference_coverage"]) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_moments_that_are_not_finite_change_nothing_and_are_counted(rng, bad):
    gradient, moments = tree(rng), moments_of(inputs_of(rng))
    tx = transformation()
    before = refresh(tx.init(gradient), moments=moments)
    worse = dict(moments)
    worse["attention"] = SecondMoment(
        moments["attention"].product.at[1, 2, 3].set(bad), moments["attention"].trace
    )
    after = jax.jit(refresh)(before, moments=worse)
    assert_close(after.basis, before.basis, 0)
    assert int(after.refused_refreshes) == 1
    assert int(after.refreshes) == 1


def test_degenerate_moments_put_no_noise_into_the_basis(rng):
    """No input at all, the same input over and over, or one of 1e-20: rank 0, 1 and 1."""
    gradient = {"dense": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)}
    tx = ogpsa_project(6, subspace="inputs", energy=1.0, kernels={"dense": Kernel()})
    row = rng.standard_normal((1, 6))
    for x, rank in ((np.zeros((3, 6)), 0), (np.repeat(row, 50, 0), 1), (1e-15 * row, 1)):
        moments = {"dense": second_moment(jnp.asarray(x, jnp.float32))}
        updates, state = _updated(tx, gradient, moments=moments)
        assert int(state.rank_used[0]) == rank
        assert int(state.refreshes) == 1
        assert_close(updates["dense"], exact_off(gradient["dense"], row if rank else None), 2e-6)


def exact_off(gradient, row):
    g = np.asarray(gradient, np.float64)
    return g if row is None else g - row.T @ (row @ g) / np.sum(row**2)


def test_a_gradient_that_is_not_finite_stays_so_and_is_not_spread(rng):
    gradient = tree(rng)
    gradient["dense"] = gradient["dense"].at[0, 0].set(jnp.inf)
    updates, _ = jax.jit(transformation().update)(gradient, transformation().init(gradient))
    np.testing.assert_array_equal(updates["dense"], gradient["dense"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("basis_dtype", [None, "bfloat16"])
def test_dtypes_are_kept_and_a_rounded_basis_projects_exactly_onto_its_own_span(
    rng, dtype, basis_dtype
):
    inputs, gradient = inputs_of(rng), tree(rng, dtype)
    tx = transformation(energy=1.0, basis_dtype=basis_dtype)
    state = refresh(tx.init(gradient), moments=moments_of(inputs))
    updates, state = jax.jit(tx.update)(gradient, state)
    jax.tree.map(lambda u, g: np.testing.assert_equal(u.dtype, g.dtype), updates, gradient)
    assert state.basis["attention"].dtype == (basis_dtype or dtype)
    if dtype == "float32":
        u = np.asarray(state.basis["dense"].astype(jnp.float32), np.float64)
        u = u[:, np.any(u, axis=0)]
        g = np.asarray(gradient["dense"], np.float64)
        want = g - u @ np.linalg.solve(u.T @ u, u.T @ g)
        assert_close(updates["dense"], want, 2e-6)


def test_nothing_compiles_anew_and_donated_states_work(rng):
    gradient = tree(rng)
    tx = optax.chain(transformation(), optax.sgd(0.1))
    update = jax.jit(tx.update, donate_argnums=1)
    again = jax.jit(refresh, donate_argnums=0)
    state = tx.init(gradient)
    for _ in range(3):
        state = again(state, moments=moments_of(inputs_of(rng)))
        _, state = update(gradient, state)
    assert update._cache_size() == 1
    assert int(diagnostics(state)["refreshes"]) == 3


def test_kernels_need_not_be_in_the_tree_of_a_wrapper(rng):
    """Masked and partitioned: only what is there is projected, and the rest of the group is not."""
    inputs, gradient = inputs_of(rng), tree(rng)
    labels = jax.tree.map(lambda _: "ours", gradient)
    labels["layers"]["v"] = "other"
    ours = optax.chain(transformation(energy=1.0, others="leave"), optax.sgd(1.0))
    tx = optax.partition({"ours": ours, "other": optax.sgd(1.0)}, labels)
    state = refresh(tx.init(gradient), moments=moments_of(inputs))
    updates, _ = jax.jit(tx.update)(gradient, state)
    want = exact(gradient, inputs)
    assert_close(updates["layers"]["q"], -want["layers"]["q"], 2e-6)
    assert_close(updates["layers"]["v"], -gradient["layers"]["v"], 0)
    assert_close(updates["bias"], -gradient["bias"], 0)


def test_first_moments_are_projected_with_the_new_subspace(rng, relaxed):
    inputs, gradient = inputs_of(rng), tree(rng)
    tx = optax.chain(transformation(energy=1.0), relaxed(optax.trace(0.9)))
    state = tx.init(gradient)
    _, state = jax.jit(tx.update)(gradient, state)
    again = jax.jit(refresh, static_argnames="project_momentum")
    state = again(state, moments=moments_of(inputs), project_momentum=True)
    assert_orthogonal_to_inputs(state[1].trace, inputs)


@pytest.mark.parametrize("subspace", ["gradients", "inputs"])
def test_replay_needs_the_reference_and_adds_it(rng, subspace):
    params, gradient, reference = tree(rng), tree(rng), tree(rng)
    settings = {"window": 1} if subspace == "gradients" else {}
    if subspace == "inputs":
        settings = {"subspace": "inputs", "kernels": KERNELS, "energy": 1.0, "others": "leave"}
    tx = ogpsa(optax.sgd(1.0), 20 if subspace == "inputs" else 1, replay=0.5, **settings)
    state, inputs = tx.init(params), inputs_of(rng)
    if subspace == "inputs":
        state = refresh(state, moments=moments_of(inputs))
    updates, _ = jax.jit(tx.update)(gradient, state, params, reference=reference)
    if subspace == "inputs":  # what is replayed is projected too
        both = jax.tree.map(lambda g, r: -(g + 0.5 * r), gradient, reference)
        want = exact(both, inputs)
        assert_close(updates["dense"], want["dense"], 3e-6)
        assert_close(updates["bias"], both["bias"], 1e-6)
    else:
        one = ogpsa_project(1)
        plain, _ = one.update(gradient, refresh(one.init(params), [reference]))
        want = jax.tree.map(lambda g, r: -(g + 0.5 * r), plain, reference)
        assert_close(updates, want, 3e-6)
    with pytest.raises(ValueError, match="the keyword reference"):
        tx.update(gradient, state, params)


@pytest.mark.parametrize("wrap", ["partition", "multi_steps", "train_state"])
def test_a_wrapper_that_drops_the_reference_raises_at_once(rng, wrap):
    params, gradient, reference = tree(rng), tree(rng), tree(rng)
    tx = ogpsa(optax.sgd(1.0), 1, replay=1.0)
    if wrap == "partition":
        tx = optax.partition({"all": tx}, jax.tree.map(lambda _: "all", params))
        state = tx.init(params)
        tx.update(gradient, state, params, reference=reference)  # it passes keywords on
        with pytest.raises(ValueError, match="the keyword reference"):
            tx.update(gradient, state, params)
    elif wrap == "multi_steps":
        tx = optax.MultiSteps(tx, 2)
        state = tx.init(params)
        with pytest.raises(ValueError, match="the keyword reference"):
            tx.update(gradient, state, params)
    else:
        train_state = pytest.importorskip("flax.training.train_state")
        state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
        with pytest.raises(ValueError, match="the keyword reference"):
            state.apply_gradients(grads=gradient)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": -1.0}, "replay must be"),
        ({"replay": 1.0, "placement": "update"}, "takes the replayed gradient out"),
        ({"window": 0}, "window must be"),
        ({"window": 1, "subspace": "inputs", "kernels": KERNELS}, "made by refresh"),
    ],
)
def test_replay_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ogpsa(optax.sgd(1.0), 1, **settings)


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


def test_both_kinds_of_subspace_in_one_chain(rng):
    inputs, gradient, reference = inputs_of(rng), tree(rng), tree(rng)
    spans = lambda path, leaf: "span" if "bias" in jax.tree_util.keystr(path) else None  # noqa: E731
    tx = optax.chain(
        transformation(energy=1.0, others="leave"), ogpsa_project(1, scope=spans), optax.sgd(1.0)
    )
    state = refresh(tx.init(gradient), [reference], moments=moments_of(inputs))
    updates, state = jax.jit(tx.update)(gradient, state)
    assert isinstance(state[0], InputState)
    assert_orthogonal_to_inputs(updates, inputs)
    assert abs(np.vdot(updates["bias"], reference["bias"])) < 1e-5


def test_flax_kernels_takes_dense_layers_alone():
    found = {
        name: flax_kernels(path, leaf) is not None
        for name, tree in {
            "dense": {"Dense_0": {"kernel": jnp.zeros((2, 3))}},
            "bias": {"Dense_0": {"bias": jnp.zeros(3)}},
            "conv": {"Conv_0": {"kernel": jnp.zeros((3, 3, 2, 4))}},
            "embedding": {"Embed_0": {"embedding": jnp.zeros((5, 2))}},
        }.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert found == {"dense": True, "bias": False, "conv": False, "embedding": False}


def test_reference_gradients_vanish_along_the_step(rng):
    """To first order, no reference loss changes: the gradient of a linear layer is in the span."""
    x = jnp.asarray(rng.standard_normal((1, 4, 6)), jnp.float32)
    params = {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    tx = ogpsa_project(6, subspace="inputs", energy=1.0, kernels=flax_kernels)
    loss = lambda p, batch: jnp.mean(jnp.tanh(batch @ p["kernel"]) ** 2)  # noqa: E731
    state = refresh(tx.init(params), moments={"kernel": second_moment(x)})
    gradient = {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    updates, _ = tx.update(gradient, state)
    (reference,) = reference_gradients(loss, params, [x])
    products = itertools.starmap(
        lambda a, b: np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)),
        zip(jax.tree.leaves(updates), jax.tree.leaves(reference), strict=True),
    )
    norms = optax.global_norm(updates) * optax.global_norm(reference)
    assert abs(sum(products)) < 1e-5 * float(norms)

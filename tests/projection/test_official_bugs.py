"""Numerical bugs of the official code: its formula fails here, ours does not.

Formulas transcribed from SunGL001/OGPSA (``sft_pg/trainer.py``): per tensor, references normalised
unless their norm is at most 1e-10, Gram–Schmidt over two of them,
``g ← g − (g·b)/(b·b + 1e-8) b``, everything in the dtype of the gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogpsa_jax import ogpsa_project, refresh

from .helpers import project


def official_basis(references):
    """Unit vectors; the second without the first; the third and later are dropped."""
    basis = []
    for reference in references[:2]:
        norm = jnp.linalg.norm(reference)
        if norm <= 1e-10:
            continue
        unit = reference / norm
        for other in basis:
            unit = unit - jnp.sum(unit * other) * other
            unit = unit / jnp.linalg.norm(unit)
        basis.append(unit)
    return basis


def official_project(gradient, basis):
    for b in basis:
        epsilon = jnp.asarray(1e-8, b.dtype)
        gradient = gradient - jnp.sum(gradient * b) / (jnp.sum(b * b) + epsilon) * b
    return gradient


def official_threshold(gradient, basis):
    """With one set: projected where it points against the set."""
    against = jnp.sum(gradient * basis[0]) < 0
    return official_project(gradient, basis) if against else gradient


def ours(gradient, references, rank=2, **settings):
    out, _ = project({"w": gradient}, [{"w": r} for r in references], rank, **settings)
    return out["w"]


def overlap(a, b):
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (a, b))
    return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)


def normal(rng, size=300, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(size), dtype)


def test_parallel_references_put_no_noise_into_the_basis(rng):
    # The second reference is the first, but for round-off: the span has one dimension.
    reference = normal(rng)
    pair = [reference, jnp.float32(3.0) * reference]
    r = np.asarray(reference, np.float64)

    def error(project_one):
        worst = 0.0
        for _ in range(16):
            gradient = normal(rng)
            g = np.asarray(gradient, np.float64)
            desired = g - (g @ r) / (r @ r) * r
            actual = np.asarray(project_one(gradient), np.float64)
            worst = max(worst, np.linalg.norm(actual - desired) / np.linalg.norm(g))
        return worst

    basis = official_basis(pair)
    assert error(lambda g: official_project(g, basis)) > 1e-2
    assert error(lambda g: ours(g, pair)) < 1e-6


def test_bfloat16_gradients_lose_no_orthogonality(rng):
    # Gradients nearly along the reference: what is left is small beside what is taken.
    reference = normal(rng, 4096)
    unit = reference / jnp.linalg.norm(reference)
    low = unit.astype(jnp.bfloat16)
    worst_official = worst_ours = 0.0
    for _ in range(8):
        size = jnp.float32(rng.uniform(1.0, 2.0))
        noise = normal(rng, 4096)
        noise = jnp.float32(0.02) * noise / jnp.linalg.norm(noise)
        gradient = (size * unit + noise).astype(jnp.bfloat16)
        left = official_project(gradient, [low])
        worst_official = max(worst_official, overlap(left, low))
        # The basis in float32: what a basis rounded to bfloat16 spans is already 1e-3 away.
        left = ours(gradient, [low], basis_dtype="float32")
        worst_ours = max(worst_ours, overlap(left, low))
    assert worst_official > 0.02
    # What is left is rounded once, to 8 bits: each entry moves by at most 2^-8 of itself.
    assert worst_ours < 2.0**-8


def test_the_conflict_rule_with_two_sets_neither_always_projects_nor_never(rng):
    pair = [normal(rng), normal(rng)]
    units = [r / jnp.linalg.norm(r) for r in pair]
    basis = official_basis(pair)
    agreeing, opposing = units[0] + units[1], -units[0] - units[1]
    # SFT projects whatever the sign; DPO leaves whatever the sign.
    assert jnp.linalg.norm(official_project(agreeing, basis)) < 1e-5
    official_dpo = opposing
    assert overlap(official_dpo, pair[0]) > 0.1
    np.testing.assert_allclose(ours(agreeing, pair, rule="conflict"), agreeing, rtol=1e-6)
    assert jnp.linalg.norm(ours(opposing, pair, rule="conflict")) < 1e-5


def test_the_conflict_decision_does_not_depend_on_how_the_batch_is_cut(rng, relaxed):
    reference = normal(rng)
    unit = reference / jnp.linalg.norm(reference)
    # Each pair of micro-batches disagrees about the reference; their sum opposes it.
    parts = [normal(rng) * jnp.float32(0.1) + jnp.float32(c) * unit for c in (-3.0, 1.0, -3.0, 2.0)]
    cuts = [[(parts[0] + parts[1]) / 2, (parts[2] + parts[3]) / 2], parts]

    def official(cut):
        return sum(official_threshold(part, [unit]) for part in cut) / len(cut)

    def accumulated(cut):
        chain = optax.chain(ogpsa_project(1, rule="conflict"), optax.sgd(1.0))
        tx = relaxed(optax.MultiSteps(chain, len(cut)).gradient_transformation())
        state = jax.jit(refresh)(tx.init(unit), [reference])
        update = jax.jit(tx.update)
        for part in cut:
            out, state = update(part, state, unit)
        return out

    assert jnp.max(jnp.abs(official(cuts[0]) - official(cuts[1]))) > 1e-2
    np.testing.assert_allclose(accumulated(cuts[0]), accumulated(cuts[1]), atol=1e-5)


def test_small_and_further_references_are_not_silently_dropped(rng):
    gradient = normal(rng)
    faint = [jnp.float32(1e-13) * normal(rng)]
    assert overlap(official_project(gradient, official_basis(faint)), faint[0]) > 1e-4
    assert overlap(ours(gradient, faint), faint[0]) < 1e-6
    three = [normal(rng) for _ in range(3)]
    gradient = gradient + three[2]
    assert overlap(official_project(gradient, official_basis(three)), three[2]) > 0.1
    assert max(overlap(ours(gradient, three, rank=3), r) for r in three) < 1e-6

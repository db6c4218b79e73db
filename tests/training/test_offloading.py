"""Host memory: the same numbers, and arrays that lie where the configuration says."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax import remat
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.planning.flops import count_flops
from ogpsa_jax.training import offloading, step
from ogpsa_jax.training.run import train

from .conftest import TINY
from .test_mesh import assert_same_numbers
from .test_resume import assert_same_end

OFFLOAD = "ogpsa.offload=true"
BASES = {
    "refreshed": (),
    "inputs": ("ogpsa={preset: recommended, rank: 8}", "references.in_step=null"),
}


@pytest.mark.parametrize("kind", BASES)
def test_offloaded_runs_give_the_same_numbers(
    kind, configured, tmp_path, on_some_devices, monkeypatch
):
    settings = (*BASES[kind], "mesh.fsdp=2")
    train(configured(tmp_path / "device", *settings))
    places = []
    first_state = step.first_state

    def seen(*args, **options):
        state = first_state(*args, **options)
        places.extend(
            (leaf.size, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(state.opt_state)
        )
        return state

    monkeypatch.setattr("ogpsa_jax.training.loop.first_state", seen)
    train(configured(tmp_path / "host", *settings, OFFLOAD))
    assert_same_numbers(tmp_path / "host", tmp_path / "device")
    large = {kind for size, kind in places if size >= 2**12}
    assert large == {"pinned_host"}
    assert {kind for size, kind in places if size < 2**12} == {"device"}


def test_an_offloaded_run_resumes_exactly(interrupted, configured, tmp_path, on_some_devices):
    whole = configured(tmp_path / "whole", OFFLOAD)
    train(whole)
    train(configured(interrupted, OFFLOAD))  # it began on the devices
    assert_same_end(interrupted, tmp_path / "whole")


def test_devices_without_host_memory_are_refused(monkeypatch):
    class Memory:
        kind = "device"

    class Device:
        device_kind = "Toaster"

        def addressable_memories(self):
            return [Memory()]

    class Mesh:
        devices = np.array([Device()])

    with pytest.raises(InputError, match=r"ogpsa\.offload: Toaster has no pinned host memory"):
        offloading.check_host_memory(Mesh())


def test_an_unknown_policy_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"one of none, full, dots, .*, got 'minimal'"):
        Decoder(read_config(TINY), rngs=nnx.Rngs(0), remat="minimal")


def loss_gradient(policy: str):
    """The gradient of a small model as a function of its parameters, and these."""
    model = Decoder(read_config(TINY), rngs=nnx.Rngs(0), remat=policy)
    graphdef, params = nnx.split(model)
    ids = jnp.arange(48, dtype=jnp.int32).reshape(2, 24)
    return jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(ids) ** 2)), params


@pytest.mark.parametrize("policy", get_args(remat.Remat)[1:])
def test_every_policy_gives_the_gradient_without_one(policy):
    found, wanted = (
        jax.tree.leaves(jax.jit(gradient)(params))
        for gradient, params in (loss_gradient(policy), loss_gradient("none"))
    )
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_policies_compute_again_what_they_do_not_save():
    flops = {policy: count_flops(*loss_gradient(policy)) for policy in get_args(remat.Remat)}
    order = ("none", "dots", "save_dot_except_mlp", "save_qkv_proj", "full")
    counts = [flops[policy] for policy in order]
    assert counts == sorted(counts)
    assert len({flops[policy] for policy in order[1:]}) == 4
    assert flops["dots_offloaded"] == flops["dots"]
    assert flops["qkv_proj_offloaded"] == flops["save_qkv_proj"]
    assert flops["full_offloaded"] == flops["full"]


@pytest.mark.parametrize("policy", get_args(remat.Remat))
def test_offloaded_policies_and_they_alone_use_host_memory(policy):
    gradient, params = loss_gradient(policy)
    program = str(jax.make_jaxpr(gradient)(params))
    assert ("<host>" in program) == policy.endswith("_offloaded")

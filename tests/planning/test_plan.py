"""A plan is made of the programs that training compiles, and counts what they do."""

import importlib.util
import json
import random
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ogpsa_jax import cli, ogpsa_project, refresh
from ogpsa_jax.config import load_config
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.models.attention import causal_attention
from ogpsa_jax.planning import plan as planning
from ogpsa_jax.planning.abstract import abstract_run
from ogpsa_jax.planning.devices import DEVICES, parse_target, planned_mesh
from ogpsa_jax.planning.flops import count_flops
from ogpsa_jax.planning.text import plan_text
from ogpsa_jax.training.mesh import make_mesh, shard_rows
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.prepare import (
    model_config,
    prepare_data,
    prepare_model,
    trained_parameters,
)
from ogpsa_jax.training.step import Network, first_state, make_train_step
from ogpsa_jax.training.workload import prepare_workload

SMOKE = "configs/smoke-sft.yaml"
EIGHT = parse_target("h100:8")
PAPER = ["ogpsa.preset=paper"]
SETTINGS = {
    "inputs": [],
    "gradients": PAPER,
    "in step": ["ogpsa.preset=in-step", "train.batch_size=16"],
    "off, adapters": ["ogpsa.preset=off", "model.lora.rank=4"],
    "tensor": [*PAPER, "mesh.tensor=2"],
    "context": [*PAPER, "mesh.context=2"],
}


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_the_planned_step_is_the_program_that_training_compiles(overrides):
    config = load_config(SMOKE, overrides)
    mesh = make_mesh(config.mesh)
    workload = prepare_workload(config, prepare_data(config, model_config(config)), mesh)
    network = Network.of(prepare_model(config, mesh), trained_parameters(config))
    optimizer = make_optimizer(config, 100)
    state = first_state(network.trained, optimizer, mesh, refreshes=config.refreshes)
    batches = [shard_rows(workload.batches.batch(0), mesh)]
    reference_loss = None
    if workload.in_step_batches is not None:
        batches.append(shard_rows(workload.in_step_batches.batch(0), mesh))
        reference_loss = workload.reference_loss
    step = make_train_step(
        network.graphdef, workload.objective, optimizer, reference_loss=reference_loss
    )
    real = step.lower(state, network.frozen, *batches)
    planned = abstract_run(config, mesh).train_step()
    assert jax.tree.map(jnp.shape, planned.args[0]) == jax.tree.map(jnp.shape, state)
    assert planned.call.lower(*planned.args).as_text() == real.as_text()


def test_a_planned_mesh_has_the_axis_context_where_rows_are_split():
    assert (
        planned_mesh(MeshSection(context=2, tensor=2), EIGHT).shape
        == make_mesh(MeshSection(context=2, tensor=2)).shape
    )
    with pytest.raises(InputError, match=r"data x fsdp x context x tensor = 1 x 2 x 3 x 1"):
        planned_mesh(MeshSection(context=3), EIGHT)


def test_operations_are_counted_as_often_as_loops_run_and_again_where_recomputed():
    layers, rows, width = 5, 4, 16

    def loss(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    x, weights = jnp.ones((rows, width)), jnp.ones((layers, width, width))
    forward = layers * 2 * rows * width**2
    assert count_flops(jax.jit(loss), x, weights) == forward
    assert count_flops(jax.grad(loss, argnums=1), x, weights) == 4 * forward


def test_of_a_causal_kernel_half_of_the_blocks_are_counted():
    q = jnp.ones((2, 1024, 4, 8))
    whole, kernel = (
        count_flops(partial(causal_attention, kind=kind), q, q, q) for kind in ("xla", "splash")
    )
    assert whole == 2 * kernel == 2 * 4 * 2 * 2 * 1024**2 * 8


def test_operations_without_loops_are_those_that_the_compiler_counts():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    a, b, c = np.random.default_rng(seed).integers(8, 30, size=3)

    def product(x, y):
        return jnp.einsum("abc,cbd->ad", x, y)

    args = np.ones((7, a, b), np.float32), np.ones((b, a, c), np.float32)
    compiled = jax.jit(product).lower(*args).compile().cost_analysis()
    assert count_flops(product, *args) == pytest.approx(compiled["flops"], rel=0.01)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> planning.Plan:
    cache = tmp_path_factory.mktemp("cache")
    found = planning.plan(load_config(SMOKE, PAPER), EIGHT, cache=cache)
    with pytest.MonkeyPatch.context() as patch:  # a second time nothing is compiled
        patch.setattr(planning, "collectives", None)
        assert planning.plan(load_config(SMOKE, PAPER), EIGHT, cache=cache) == found
    return found


def test_bytes_by_kind_are_those_of_the_state(found):
    config = load_config(SMOKE, PAPER)
    step = found.programs["train step"]
    assert step.arguments == pytest.approx(sum(found.held.values()), rel=0.02)
    assert found.held["basis"] == pytest.approx(
        config.ogpsa.rank * found.held["parameters"], rel=0.1
    )


def test_what_is_offloaded_is_on_hosts_and_not_on_devices():
    mesh = planned_mesh(MeshSection(), EIGHT)
    here, there = (
        abstract_run(load_config(SMOKE, [*PAPER, f"ogpsa.offload={on}"]), mesh)
        for on in ("false", "true")
    )
    held, left = planning.bytes_by_kind(here), planning.bytes_by_kind(there)
    assert left["parameters"] == held["parameters"]
    assert left["moments"] + left["basis"] < 0.1 * (held["moments"] + held["basis"])
    moved = planning.bytes_on_hosts(there)["offloaded state, a device"]
    assert sum(left.values()) + moved == sum(held.values())
    assert planning.bytes_on_hosts(here) == {}


def test_predictions_of_the_initial_model_are_counted_in_batches_and_on_hosts():
    mesh = planned_mesh(MeshSection(), EIGHT)
    config = load_config(SMOKE, ["ogpsa.preset=in-step", "references.target=initial"])
    found = planning.bytes_on_hosts(abstract_run(config, mesh))
    rows = sum(section.samples or 200 for section in config.references.sets)
    kept = config.references.top_k or 8
    assert found == {
        "predictions on references, a process": rows * config.data.max_length * (8 * kept + 4)
    }


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (("train.steps=7",), 7),
        (("train.steps=null", "data.train.0.samples=100", "train.epochs=3"), 75),
        (("train.steps=null", "data.train.0.samples=null"), None),
    ],
)
def test_steps_are_those_of_the_samples(overrides, steps):
    config = load_config(SMOKE, [*PAPER, "train.batch_size=4", *overrides])
    assert planning.steps_of(config) == steps


def test_what_a_plan_holds_is_told_and_given_as_json(found):
    assert set(found.programs) == {"train step", "refresh", "evaluation batch"}
    sent = {cause for by in found.programs["train step"].sent.values() for cause in by}
    assert {"parameters", "gradients", "projection"} <= sent
    assert found.fits
    assert json.loads(json.dumps(found.as_dict()))["programs"]["refresh"]["flops"] > 0
    text = plan_text(found)
    for part in ("parameters", "refresh", "projection", "h100:8", "estimate", "fits"):
        assert part in text
    steps = found.programs["train step"].seconds * found.steps
    assert found.seconds > steps  # the refreshes


def test_what_does_not_fit_says_what_to_change(monkeypatch, tmp_path):
    small = parse_target("h100:8")
    device = DEVICES["h100"].__class__("tiny", (), 1e6, 1e12, 1e12, 1e12)
    small = type(small)(device, None, 8, 1, "cpu")
    config = load_config(SMOKE, [*PAPER, "train.batch_size=32"])
    found = planning.plan(config, small, cache=tmp_path)
    assert not found.fits
    assert "train.remat: full" in found.advice
    assert "ogpsa.basis_dtype: bfloat16" in found.advice
    assert f"does not fit; try {found.advice[0]}" in plan_text(found)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a10:8", "unknown device 'a10'; choose v4, v5e"),
        ("v5p:8", "give 3 sizes of v5p, such as v5p:2x2x2"),
        ("v5e:4xfour", "give 2 sizes of v5e"),
        ("h100:0", "give 1 sizes of h100"),
        ("0*v5e:4x4", "give 2 sizes"),
        ("h100", "give 1 sizes"),
        ("v5p:99999x9999x9999", "more than 100,000 devices; give fewer"),
    ],
)
def test_devices_that_are_none_are_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_target(text)


def test_a_mesh_that_does_not_make_the_devices_is_refused():
    with pytest.raises(InputError, match="does not make the 8 devices there are"):
        planned_mesh(MeshSection(fsdp=3), EIGHT)


def test_the_command_prints_json_and_refuses_with_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(planning, "_compiled", lambda *_: planning.Compiled(1.0, 1, 1, 1, {}, 1.0))
    assert cli.main(["plan", SMOKE, "train.steps=7", "--on", "h100:8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7
    assert cli.main(["plan", SMOKE, "--on", "x:8"]) == 2
    assert "ogpsa-jax: --on: x:8: unknown device 'x'" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs, libtpu, is absent"
)
@pytest.mark.parametrize("on", ["v5e:4x8", "2*v5e:4x4", "v4:2x4x4"])
def test_the_real_compiler_plans_for_tpus(on, tmp_path):
    config = load_config(SMOKE, ["train.batch_size=32"])
    found = planning.plan(config, parse_target(on), cache=Path(tmp_path))
    assert (found.devices, found.compiled_for) == (32, "tpu")
    assert found.programs["train step"].bytes_sent > 0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs, libtpu, is absent"
)
def test_a_refresh_on_tpus_holds_intermediate_vectors_of_one_leaf_at_a_time():
    rank, leaves, shape = 4, 8, (4, 2048, 2048)
    mesh = planned_mesh(MeshSection(), parse_target("v5e:2x2"))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    like = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    params = {f"w{i}": like for i in range(leaves)}
    state = jax.tree.map(
        lambda x: (
            like if x.shape == shape else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        ),
        jax.eval_shape(ogpsa_project(rank=rank, stacked={"w": 0}).init, params),
    )
    compiled = jax.jit(refresh, donate_argnums=0).lower(state, [params, params]).compile()
    size = leaves * np.prod(shape) * 4 / mesh.size
    # Of a leaf, both passes; a batch of leaves may be as large as 2**24 entries, and is one here.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * rank * size

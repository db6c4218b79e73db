"""What is minimised, clipped, scheduled and decayed, against its definition and transformers'."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ogpsa_jax import refresh
from ogpsa_jax.config.sections import OptimizerSection
from ogpsa_jax.models import Decoder, abstract_decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.models.names import tensor_names
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.optimizer import decays, learning_rate, make_optimizer
from ogpsa_jax.training.prepare import model_config, prepare_data

from .conftest import TINY, epoch_total


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_an_epoch_is_that_of_its_examples_one_by_one(packing, configured, tmp_path):
    config = configured(tmp_path)
    examples = prepare_data(config, model_config(config)).train
    model = Decoder(read_config(TINY), rngs=nnx.Rngs(3), dtype="float32")
    loss = nnx.jit(lambda model, batch: sft_loss(model, batch)[:2])

    total = partial(epoch_total, loss, model, examples)
    nats, tokens = total(False, 1)
    assert tokens == sum(int(e.sequences[0].loss_mask.sum()) for e in examples)
    # A few hundred float32 terms, summed in another order.
    assert total(packing, 8) == (pytest.approx(nats, rel=1e-5), tokens)


def test_clipping_comes_after_the_projection(configured, tmp_path):
    limit = 0.25
    config = configured(tmp_path, f"optimizer.max_grad_norm={limit}", "ogpsa.rank=1")
    optimizer = make_optimizer(config, 10)
    key = jax.random.key(np.random.SeedSequence().entropy % 2**32)
    params = {"w": jnp.zeros((6, 5))}
    reference, gradient = ({"w": jax.random.normal(k, (6, 5))} for k in jax.random.split(key))
    state = refresh(optimizer.init(params), [reference])
    _, state = optimizer.update(gradient, state, params)
    first_moment = optax.tree.get(state, "mu")["w"] / (1 - config.optimizer.betas[0])
    # Clipped first, the projection would have shortened it further.
    np.testing.assert_allclose(jnp.linalg.norm(first_moment), limit, rtol=1e-5)
    assert abs(float(jnp.vdot(first_moment, reference["w"]))) < 1e-5


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule, warmup):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    from transformers import get_scheduler

    total = 40
    section = OptimizerSection(learning_rate=3e-4, schedule=schedule, warmup_steps=warmup)
    ours = [float(learning_rate(section, total)(step)) for step in range(total)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_weight_decay_spares_what_transformers_spares(model_type, tmp_path):
    pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    raw = json.loads((TINY / "config.json").read_text())
    raw |= {"model_type": model_type, "tie_word_embeddings": False, "head_dim": 16}
    raw["architectures"] = [f"{model_type.capitalize()}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch_model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    theirs = transformers.Trainer.get_decay_parameter_names(None, torch_model)

    state = nnx.state(abstract_decoder(read_config(tmp_path)), nnx.Param)
    mask = {
        tuple(part.key for part in path): decayed
        for path, decayed in jax.tree_util.tree_leaves_with_path(decays(nnx.to_pure_dict(state)))
    }
    names = tensor_names(state)
    assert {t.name for t in names} == {name for name, _ in torch_model.named_parameters()}
    assert {t.name for t in names if mask[t.path]} == set(theirs)

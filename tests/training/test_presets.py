"""What a preset says, what a configuration may say besides, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ogpsa_jax.config import RunConfig, load_config
from ogpsa_jax.config.presets import IN_DPO, PRESETS
from ogpsa_jax.config.sections import InStepSection, OgpsaSection
from ogpsa_jax.errors import InputError

OBJECTIVES = {"sft": PRESETS, "dpo": IN_DPO}


def settings(**sections: Any) -> dict[str, Any]:
    return {
        "optimizer": {"learning_rate": 1e-4},
        **sections,
        "references": {"sets": [{"path": "general.jsonl"}], **sections.get("references", {})},
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_out_whole_and_is_what_a_run_gets(objective, name):
    preset = OBJECTIVES[objective][name]
    assert preset["ogpsa"].keys() == OgpsaSection.model_fields.keys() - {"preset"}
    in_step = preset["references"]["in_step"]
    assert in_step is None or in_step.keys() == InStepSection.model_fields.keys()
    for lora in (None, {"rank": 2}):
        raw = settings(objective=objective, ogpsa={"preset": name}, model={"lora": lora})
        config = RunConfig.model_validate(raw)
        found = config.ogpsa.model_dump(exclude={"preset"}, exclude_unset=True)
        assert found == preset["ogpsa"]
        said = config.references.model_dump(include=set(preset["references"]))
        assert said == preset["references"]


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_configuration_says_counts_key_by_key_and_changes_nothing_else(name):
    preset = PRESETS[name]
    raw = settings(ogpsa={"preset": name, "rank": 3, "basis_dtype": "bfloat16"})
    in_step = preset["references"]["in_step"]
    if in_step is not None:
        raw["references"]["in_step"] = {"share": 0.25}
    config = RunConfig.model_validate(raw)
    found = config.ogpsa.model_dump(exclude={"preset"}, exclude_unset=True)
    assert found == {**preset["ogpsa"], "rank": 3, "basis_dtype": "bfloat16"}
    if in_step is not None:
        assert config.references.in_step is not None
        assert config.references.in_step.model_dump() == {**in_step, "share": 0.25}


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        ("paper", ["references.in_step={share: 0.5}"], "ogpsa.refresh: .*in_step to null"),
        ("paper", ["ogpsa.refresh=null"], "ogpsa.refresh: nothing says when .*{every: 30}"),
        ("in-step", ["references.in_step=null"], "ogpsa.refresh: nothing says when"),
        ("in-step", ["ogpsa.refresh.every=30"], "ogpsa.refresh: .*in_step to null"),
        ("in-step", ["ogpsa.placement=update"], "replay_weight: .*set it to 0"),
        ("recommended", ["ogpsa.subspace=gradients"], "ogpsa.rank: 1024"),
        ("paper", ["ogpsa.subspace=inputs"], "ogpsa.energy: .*recommended"),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_its_remedy(
    preset, overrides, told, tmp_path: Path
):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(ogpsa={"preset": preset})))
    load_config(path)
    with pytest.raises(InputError, match=told):
        load_config(path, overrides)
    assert not load_config(path, [*overrides, "ogpsa.preset=off"]).projects  # off is off

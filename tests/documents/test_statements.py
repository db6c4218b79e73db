"""Statements of the documents that the code can decide."""

import dataclasses
import re

import pytest
import yaml

from ogpsa_jax.demo.methods import PAPER_METHOD, plan
from ogpsa_jax.demo.recipe import RECIPES
from ogpsa_jax.evaluation.suite import JudgeSettings, Suite
from ogpsa_jax.training.config import RunConfig
from ogpsa_jax.training.config_file import key_of, load_config

from .reading import PAGES, REPOSITORY, blocks

_NEEDED = {
    "references": {"sets": [{"path": "general.jsonl"}]},
    "optimizer": {"learning_rate": 1e-6},
}
# `train.steps`, `data.train[].weight`, `references.in_step: {window: 1}` in a sentence or a table.
_KEY = re.compile(r"`([a-z_]+(?:\.[a-z_\[\]]+)+)(: [^`\n]+)?`")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_the_yaml_of_a_page_is_valid(page):
    for block in blocks(page, "yaml"):
        shown = yaml.safe_load(block)
        if "tasks" in shown:
            Suite.model_validate(shown)
        elif "judge" in shown:
            JudgeSettings.model_validate(shown["judge"])
        else:
            RunConfig.model_validate(
                {**shown, **{key: value | shown.get(key, {}) for key, value in _NEEDED.items()}}
            )


def test_every_key_that_a_page_names_is_there(tmp_path):
    settings, named = tmp_path / "run.yaml", 0
    settings.write_text(yaml.safe_dump({**_NEEDED, "objective": "dpo"}))
    for page in PAGES:
        for key, value in _KEY.findall((REPOSITORY / page).read_text(encoding="utf-8")):
            if key.partition(".")[0] not in RunConfig.model_fields or key.endswith(".yaml"):
                continue
            named += 1
            assert key_of(key.replace("[]", ".0")), f"{page}: `{key}` is no key"
            if value:  # on the command line it is the same, and off is text there as well
                load_config(settings, [f"{key}={value[2:]}"])
    assert named > 20


def test_the_demonstrations_published_setting_has_the_steps_that_the_page_says():
    stage = RECIPES["full"].stages[1]
    oftener = dataclasses.replace(PAPER_METHOD, ogpsa={**PAPER_METHOD.ogpsa, "refresh_every": 5})
    steps = [plan(method, stage, 0, "run").steps for method in (oftener, PAPER_METHOD)]
    text = (REPOSITORY / "docs" / "demo.md").read_text(encoding="utf-8")
    assert "that would leave {} steps instead of {} |".format(*steps) in text

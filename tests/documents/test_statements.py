"""Statements of the documents that the code can decide."""

import inspect
import itertools
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from ogpsa_jax import ogpsa_project
from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.file import key_of, load_config
from ogpsa_jax.config.presets import PRESETS
from ogpsa_jax.config.sections import DpoSection, MeshSection, ReferencesSection
from ogpsa_jax.data.formats import FORMATS
from ogpsa_jax.data.templates import BUILT_IN
from ogpsa_jax.evaluation.suite import JudgeSettings, Suite, Task
from ogpsa_jax.objectives.dpo import REFERENCE_FREE
from ogpsa_jax.training import run

from .reading import PAGES, REPOSITORY, blocks

_NEEDED = {
    "references": {"sets": [{"path": "general.jsonl"}]},
    "optimizer": {"learning_rate": 1e-6},
}
# Keys that go with another value than the default of some other key.
_TOGETHER = {
    "optimizer.stochastic_rounding": ["model.param_dtype=bfloat16"],
    "ogpsa.subspace": ["ogpsa.preset=recommended"],
    "references.target": ["references.in_step={share: 0.5}"],
}
_FILE = re.compile(r"(?<![\w/])(?:ogpsa_jax|scripts|tests|configs)/[\w./-]+\.(?:py|md|yaml)\b")
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
        for line in (REPOSITORY / page).read_text(encoding="utf-8").splitlines():
            together = []
            for key, value in _KEY.findall(line):
                if key.partition(".")[0] not in RunConfig.model_fields or key.endswith(".yaml"):
                    continue
                named += 1
                assert key_of(key.replace("[]", ".0")), f"{page}: `{key}` is no key"
                if value:  # on the command line it is the same, and off is text there as well
                    together += [f"{key}={value[2:]}", *_TOGETHER.get(key, ())]
                if not line.startswith("|"):
                    load_config(settings, together)
                    together = []
            load_config(settings, together)  # what stands in one row of a table goes together
    assert named > 20


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the rows of a page's table whose head begins so."""
    lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names(page: str, head: str) -> set[str]:
    """What stands in backticks in the first column."""
    return {name for row in table(page, head) for name in re.findall(r"`([^`]+)`", row[0])}


def test_formats_losses_kinds_and_settings_are_those_of_the_code():
    assert names("docs/data.md", "`format`") == {
        known.name for formats in FORMATS.values() for known in formats
    }
    losses = {row[0].strip("`"): row[2] for row in table("docs/dpo.md", "`dpo.loss`")}
    assert losses == {
        loss: "no" if loss in REFERENCE_FREE else "yes"
        for loss in get_args(DpoSection.model_fields["loss"].annotation)
    }
    assert names("docs/training.md", "`ogpsa.preset`") == set(PRESETS)
    assert names("docs/dpo.md", "`references.loss`") == set(
        get_args(ReferencesSection.model_fields["loss"].annotation)
    )
    assert names("docs/evaluation.md", "kind |") == {
        get_args(task.model_fields["kind"].annotation)[0] for task in get_args(get_args(Task)[0])
    }
    assert names("docs/training.md", "axis |") == {f"mesh.{a}" for a in MeshSection.model_fields}
    settings = set(inspect.signature(ogpsa_project).parameters)
    assert names("docs/core.md", "setting |") <= settings


def test_the_first_page_and_the_menu_name_every_page():
    pages = {Path(page).name for page in PAGES if page != "README.md"}
    first = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+\.md)", first)) == pages - {"index.md"}
    menu = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert pages == {
        page
        for entry in menu
        for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_a_page_names_is_there(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert not [name for name in _FILE.findall(text) if not (REPOSITORY / name).exists()]


def test_the_templates_that_the_page_names_are_built_in():
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    named = re.search(r"a jinja file or\s+one of ([^.]*)\.", text)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == set(BUILT_IN)


def test_what_a_resumed_run_may_change_is_what_the_page_says():
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    sentence = re.search(r"A resumed run may differ in (.*?);", text, re.DOTALL)
    assert sentence is not None
    free = {
        key if keys is ... else f"{key}.{name}"
        for key, keys in run._FREE_ON_RESUME.items()
        for name in ([None] if keys is ... else keys)
    }
    shown = set(re.findall(r"`([\w.]+)`", sentence[1]))
    # Of a section of one key, the page names the key.
    assert {name.removesuffix("export.dtype") or "export" for name in shown} == free - {
        "output_dir"
    }

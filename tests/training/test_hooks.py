"""Hooks hear of each step and evaluation once, when it is on disk; a failing one harms nothing."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ogpsa_jax.config import RunConfig
from ogpsa_jax.runs import RunDir
from ogpsa_jax.training import HookError, Hooks, run

from .conftest import STEPS, metrics
from .test_resume import assert_same_end

Configured = Callable[..., RunConfig]
Heard = list[tuple[str, int, Mapping[str, float]]]


def listening(heard: Heard, run_dir: Path) -> Hooks:
    """Hooks that note what they hear, and check that it is on disk by then."""

    def hook(name: str) -> Callable[[int, Mapping[str, float]], None]:
        def note(step: int, values: Mapping[str, float]) -> None:
            own = "loss" if name == "step" else "eval/general/loss"
            assert any(line["step"] == step and own in line for line in metrics(run_dir))
            heard.append((name, step, values))

        return note

    return Hooks(on_step=hook("step"), on_evaluation=hook("evaluation"))


def test_hooks_hear_each_line_once_in_order_and_on_disk(
    configured: Configured, uninterrupted: Path, on_some_devices: None, tmp_path: Path
) -> None:
    heard: Heard = []
    run.train(configured(tmp_path / "run"), listening(heard, tmp_path / "run"))
    assert_same_end(tmp_path / "run", uninterrupted)
    lines = metrics(tmp_path / "run")
    assert [step for _, step, _ in heard] == [line["step"] for line in lines]
    for (name, _, values), line in zip(heard, lines, strict=True):
        assert name == ("step" if "loss" in line else "evaluation")
        assert values == {key: value for key, value in line.items() if key not in ("step", "rows")}


@pytest.mark.parametrize("name, at", [("on_step", 3), ("on_evaluation", 0), ("on_step", STEPS)])
def test_a_hook_that_fails_ends_the_run_in_a_state_that_goes_on_exactly(
    name: str,
    at: int,
    configured: Configured,
    uninterrupted: Path,
    on_some_devices: None,
    tmp_path: Path,
) -> None:
    def failing(step: int, _: Mapping[str, float]) -> None:
        if step == at:
            raise ConnectionError("the board is not there")

    config = configured(tmp_path / "run")
    with pytest.raises(
        HookError, match=f"{name}, at step {at}, raised ConnectionError: the boa"
    ) as e:
        run.train(config, Hooks(**{name: failing}))
    assert isinstance(e.value.__cause__, ConnectionError)
    [saved] = map(int, re.findall(r"step (\d+) is saved", str(e.value)))
    assert saved == max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == max(line["step"] for line in metrics(tmp_path / "run"))
    heard: Heard = []
    run.train(config, listening(heard, tmp_path / "run"))
    assert_same_end(tmp_path / "run", uninterrupted)
    assert [step for kind, step, _ in heard if kind == "step"] == [*range(saved + 1, STEPS + 1)]


def test_each_stage_gets_hooks_of_its_own(
    ground: Path, on_some_devices: None, tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []

    def hooks(config: RunConfig) -> Hooks:
        return Hooks(on_step=lambda step, _: heard.append((config.name, step)))

    run.train_stages(
        [ground / "run.yaml", ground / "run.yaml"],
        ["train.steps=1", "ogpsa.preset=off"],
        output_dirs=[str(tmp_path / "first"), str(tmp_path / "second")],
        hooks=hooks,
    )
    assert heard == [("first", 1), ("second", 1)]


def test_on_finish_is_called_for_a_finished_run_too_and_its_failure_is_named(
    configured: Configured, uninterrupted: Path
) -> None:
    heard: list[RunDir] = []
    run.train(configured(uninterrupted), Hooks(on_finish=heard.append))
    assert heard == [RunDir(uninterrupted)]
    with pytest.raises(HookError, match=r"on_finish raised ZeroDivisionError: .*; the run is fin"):
        run.train(configured(uninterrupted), Hooks(on_finish=lambda files: 1 / 0))

"""Records of a small comparison."""

import pytest

from ogpsa_jax.runs import Cost, ScoreRecord

_SAFE = {"base": 0.03, "naive": 0.98, "ogpsa": 0.97, "merge": 0.5}


@pytest.fixture
def records(drawn):
    """Three seeds of four methods in two stages; the merge is not safe."""
    rows = []
    for stage in ("sft", "sft+dpo"):
        for seed in range(3):
            for method, general in (("naive", 0.7), ("ogpsa", 0.9), ("merge", 0.93)):
                scores = {
                    "general": general + drawn.uniform(-0.03, 0.03),
                    "safety": _SAFE[method] + drawn.uniform(-0.01, 0.01),
                    "over_refusal": drawn.uniform(0, 0.3),
                }
                cost = Cost(training_samples=100, reference_samples=10 * seed, seconds=2.5)
                rows.append(
                    ScoreRecord(
                        label=f"{method} run",
                        method=method,
                        stage=stage,
                        seed=seed,
                        scores=scores,
                        cost=cost,
                    )
                )
    base = ScoreRecord(
        label="before",
        method="base",
        stage="base",
        scores={"general": 0.95, "safety": 0.03},
        spread={"general": 0.01},
    )
    return [base, *rows]

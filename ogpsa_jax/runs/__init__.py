"""A run directory, typed: its files, what they contain, its scores, and where a model came from.

Training writes these files; evaluation and reports read them.
"""

from ogpsa_jax.runs.directory import (
    Change,
    InitialModelUse,
    OwnAnswers,
    ProjectionFigures,
    Rounding,
    RowCounts,
    Run,
    RunDir,
    Summary,
    TrainLoss,
    find_run,
    fingerprint,
    run_dir_of,
    stages,
)
from ogpsa_jax.runs.lineage import (
    Naming,
    Provenance,
    named,
    provenance,
)
from ogpsa_jax.runs.scores import (
    BASE,
    NAIVE,
    Cost,
    ScoreRecord,
    check_definitions,
    read_scores,
    write_scores,
)

__all__ = [
    "BASE",
    "NAIVE",
    "Change",
    "Cost",
    "InitialModelUse",
    "Naming",
    "OwnAnswers",
    "ProjectionFigures",
    "Provenance",
    "Rounding",
    "RowCounts",
    "Run",
    "RunDir",
    "ScoreRecord",
    "Summary",
    "TrainLoss",
    "check_definitions",
    "find_run",
    "fingerprint",
    "named",
    "provenance",
    "read_scores",
    "run_dir_of",
    "stages",
    "write_scores",
]

"""One configuration, several methods, one table: naive, paper and recommended, side by side.

Each method is a run of its own with the same seed; finished runs are not repeated. The table shows
losses in nats per token, before and after.

    python scripts/compare_methods.py CONFIG [CONFIG...] [--out runs] [key.sub=value ...]
    python scripts/compare_methods.py CONFIG --methods naive@0.33,replay@0.33,recommended

METHOD@FACTOR multiplies the configuration's learning rate. Each method needs its own rate, and
`recommended` about three times that of the others. Try several for each before you compare.

Several configurations are the stages of one pipeline, each starting from the one before.

    naive        no protection
    paper        OGPSA as published
    recommended  OGPSA as this package recommends it
    update       paper, but the update is projected
    lora         naive, adapters instead of full fine-tuning
    mixing       naive, half of the training rows from the reference sets (SFT; naive in DPO)
    a-gem        only what conflicts with the references of the batch is removed
    replay       every step also trains on a reference batch; nothing is projected
"""

import argparse
import json
import logging
import re
import sys
from pathlib import Path

from ogpsa_jax.config import load_config
from ogpsa_jax.errors import InputError
from ogpsa_jax.runs import Summary
from ogpsa_jax.training.run import train_stages

HEADLINE = ("naive", "paper", "recommended")
METHODS = {
    "naive": ["ogpsa.preset=off"],
    "paper": ["ogpsa.preset=paper"],
    "recommended": ["ogpsa.preset=recommended"],
    "update": ["ogpsa.preset=paper", "ogpsa.placement=update", "references.loss=response"],
    "lora": ["ogpsa.preset=off", "model.lora={}"],
    "mixing": ["ogpsa.preset=off"],
    "a-gem": [
        "ogpsa.preset=in-step",
        "ogpsa.rule=conflict",
        "ogpsa.scope=global",
        "references.in_step={replay_weight: 0.0}",
    ],
    "replay": [
        "ogpsa.preset=in-step",
        "ogpsa.rule=none",
        "references.in_step={share: 0.5, replay_weight: 1.0}",
    ],
}


def run(
    configs: list[Path], methods: list[str], out: Path, overrides: list[str]
) -> dict[str, list[Summary]]:
    """The summaries of each method's stages."""
    own: dict[str, list[list[str]]] = {}
    for method in methods:
        name, _, factor = method.partition("@")
        own[method] = [
            (mixing(config, overrides) if name == "mixing" else [])
            + (rate(config, overrides, float(factor)) if factor else [])
            for config in configs
        ]
        for config, settings in zip(configs, own[method], strict=True):  # before any is trained
            load_config(config, [*overrides, *METHODS[name], *settings])
    found = {}
    for method in methods:
        found[method] = train_stages(
            configs,
            [*overrides, *METHODS[method.partition("@")[0]]],
            output_dirs=[f"{out}/{config.stem}-{method}" for config in configs],
            stage_overrides=own[method],
        )
    return found


def rate(path: Path, overrides: list[str], factor: float) -> list[str]:
    """The configuration's learning rate times a factor."""
    return [
        f"optimizer.learning_rate={factor * load_config(path, overrides).optimizer.learning_rate!r}"
    ]


def known(method: str) -> bool:
    """Whether a word of ``--methods`` names a method, with or without a factor."""
    name, at, factor = method.partition("@")
    number = re.fullmatch(r"\d+\.?\d*|\.\d+", factor) and float(factor) > 0
    return name in METHODS and bool(number if at else True)


def mixing(path: Path, overrides: list[str]) -> list[str]:
    """The reference sets as further training sources, half of all rows."""
    config = load_config(path, overrides)
    if config.objective == "dpo":
        return []
    own, general = config.data.train, config.references.sets
    total = sum(source.weight for source in own)
    sources = [s.model_dump() | {"weight": 0.5 * s.weight / total} for s in own]
    sources += [s.model_dump() | {"weight": 0.5 / len(general)} for s in general]
    return [f"data.train={json.dumps(sources)}"]


# Of what a preference set measures, what a table is read for; the rest is in the JSON file.
_LEFT_OUT = ("logps_chosen", "logps_rejected", "rewards_chosen", "rewards_rejected")


def table(summaries: dict[str, Summary]) -> str:
    """Markdown: a row per method, a column per held-out measure."""
    befores = {method: summary.before for method, summary in summaries.items()}
    first = next(iter(befores.values()))
    names = [name for name in first if not name.endswith(_LEFT_OUT)]
    rows = [["", *names, "reference samples", "squared norm removed"]]
    same = all(before == first for before in befores.values())
    for method, before in ({"before": first} if same else befores).items():
        label = method if same else f"{method}, before"  # each from its own stage before
        rows.append([label, *(f"{before[name]:.3f}" for name in names), "", ""])
    for method, summary in summaries.items():
        removed = summary.projection and summary.projection.mean_removed_fraction
        rows.append(
            [
                method if same else f"{method}, after",
                *(f"{summary.after[name]:.3f}" for name in names),
                str(summary.reference_samples),
                "" if removed is None else f"{removed:.1%}",
            ]
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(cells))
        + " |"
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = "|" + "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="+", help="YAML files, then key.sub=value overrides")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--methods", default=",".join(HEADLINE), help=", ".join(METHODS))
    arguments = parser.parse_intermixed_args()  # overrides may stand after options
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ogpsa_jax").setLevel(logging.INFO)
    configs = [Path(item) for item in arguments.config if "=" not in item]
    overrides = [item for item in arguments.config if "=" in item]
    try:
        methods = arguments.methods.split(",")
        unknown = [method for method in methods if not known(method)]
        if unknown:
            raise InputError(
                f"--methods: unknown {unknown[0]!r}; known: {', '.join(METHODS)}, each perhaps "
                "with a factor, as in naive@0.5."
            )
        found = run(configs, methods, arguments.out, overrides)
    except InputError as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return 2
    for stage, config in enumerate(configs):
        summaries = {method: stages[stage] for method, stages in found.items()}
        print(f"\n{config.stem}\n\n{table(summaries)}")
        path = arguments.out / f"{config.stem}.json"
        contents = {method: summary.content() for method, summary in summaries.items()}
        path.write_text(json.dumps(contents, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

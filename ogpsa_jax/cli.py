"""The command ``ogpsa-jax``: argument parsing and nothing more."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ogpsa_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 with one sentence on stderr for bad input."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("ogpsa_jax").setLevel(logging.INFO)
    try:
        parsed.run(parsed)
    except InputError as error:
        print(f"ogpsa-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ogpsa-jax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ogpsa-jax",
        description="Safety fine-tuning of language models that keeps their general ability.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run a stage, or several in sequence",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run one stage per configuration file, each starting from the one before.\n"
        "Interrupted, the same command goes on where it was. `--keys` lists every key.",
    )
    train.add_argument("config", nargs="*", help="YAML files, then key.sub=value overrides")
    train.add_argument("--keys", action="store_true", help="list every configuration key and stop")
    train.set_defaults(run=_train)
    return parser


def _train(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.training.config_file import schema_lines

    if parsed.keys:
        print("\n".join(schema_lines()))
        return
    overrides = [item for item in parsed.config if "=" in item]
    paths = [Path(item) for item in parsed.config if "=" not in item]
    if not paths:
        raise InputError(
            "train: name at least one configuration file, as in configs/smoke-sft.yaml."
        )

    from ogpsa_jax.training.run import train_stages

    for summary in train_stages(paths, overrides):
        print(f"{summary['name']}: {summary['steps']} steps in {summary['seconds']} s")
        for name, after in summary["after"].items():
            print(f"  {name}: {summary['before'][name]:.4f} -> {after:.4f}")
        print(f"  checkpoint: {summary['export']}")


if __name__ == "__main__":
    sys.exit(main())

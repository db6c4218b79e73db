"""The command ``ogpsa-jax``: argument parsing and nothing more."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ogpsa_jax.errors import InputError

logger = logging.getLogger("ogpsa_jax.cli")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 with one sentence on stderr for bad input."""
    parsed = _parsed(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("ogpsa_jax").setLevel(logging.INFO)
    # Orbax logs the traceback of every error that it also raises.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        parsed.run(parsed)
    except InputError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(
            f"the package {error.name} is not installed; install ogpsa_jax with its extra [train], "
            "or [eval] for judges and the harness."
        )
    # Errors that no other module reports better.
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror or error}.")
    except RecursionError:
        return _refuse("a file is nested too deeply; fix it.")
    except MemoryError:
        return _refuse("out of memory; use smaller sizes.")
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        return _refuse("a path contains a null character; fix it.")
    except KeyboardInterrupt:
        print(
            "ogpsa-jax: interrupted; the same command resumes from what it saved", file=sys.stderr
        )
        return 130
    return 0


def _refuse(sentence: str) -> int:
    print(f"ogpsa-jax: {sentence}", file=sys.stderr)
    return 2


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; of ``key=value`` also those that follow an option."""
    parser = _parser()
    parsed, left = parser.parse_known_args(arguments)
    late = [item for item in left if "=" in item and not item.startswith("-")]
    if late != left or (late and not hasattr(parsed, "config")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if late:
        parsed.config = [*parsed.config, *late]
    return parsed


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
        "After an interruption, the same command resumes. `--keys` lists every key.",
    )
    train.add_argument("config", nargs="*", help="YAML files, then key.sub=value overrides")
    train.add_argument("--keys", action="store_true", help="list every configuration key and stop")
    train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan",
        help="what a run needs of machines that need not be here",
        description="Compile the programs of a run for described devices, from shapes alone: no "
        "weights, no data, no accelerator. Prints bytes on each device, operations, what is sent, "
        "the least time, and whether it fits. For TPUs, the package libtpu is the real compiler "
        "(pip install 'ogpsa-jax[plan]'); without it, and for GPUs, memory is an estimate by the "
        "compiler for CPUs.",
    )
    plan.add_argument("config", nargs="+", help="a YAML file, then key.sub=value overrides")
    plan.add_argument(
        "--on",
        required=True,
        metavar="DEVICES",
        help="v5p:2x2x2, 2*v5e:16x16 (two slices), h100:8, ...",
    )
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.set_defaults(run=_plan)

    demo = commands.add_parser(
        "demo",
        help="compare the methods in a small world on this machine",
        description="Pre-train a small model, align it by every method, draw what each one cost. "
        "After an interruption, the same command resumes.",
    )
    demo.add_argument(
        "--out",
        type=_place,
        default=Path("runs/demo"),
        help="folder for the results; default: runs/demo",
    )
    size = demo.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="an easier world, the main methods")
    size.add_argument("--thorough", action="store_true", help="three worlds, SFT and DPO")
    demo.add_argument("--seed", type=_seed, default=0, help="of the (first) world; default: 0")
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a checkpoint: safety, over-refusal, general ability",
        description="Score a checkpoint. After an interruption, the same command resumes.",
    )
    evaluate.add_argument("model", help="Hugging Face folder, hub id, or run directory")
    evaluate.add_argument("--suite", type=Path, required=True, help="YAML file of tasks")
    evaluate.add_argument("--out", type=_place, help="default: beside the run, or evaluations/")
    evaluate.add_argument(
        "--batch-size", type=_positive, default=16, help="rows a forward pass; default: 16"
    )
    evaluate.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: float32 on CPU, else bfloat16",
    )
    evaluate.add_argument(
        "--mesh",
        type=_positive,
        nargs=3,
        metavar=("DATA", "FSDP", "TENSOR"),
        help="default: all fsdp",
    )
    evaluate.add_argument("--template", help="chat template: built-in name or jinja file")
    evaluate.add_argument(
        "--judge",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the suite's judge, as in max_completion_tokens=2000 temperature=null",
    )
    evaluate.add_argument("--label", help="the model's name in reports")
    evaluate.add_argument(
        "--method",
        help="what reports take it for: base, naive, merge, mixing, ...; default: by its run",
    )
    evaluate.add_argument("--stage", help="as in reports: sft, sft+dpo, ...; default: by run")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser(
        "report",
        help="the safety-utility table and figure over runs",
        description="Table and figure of what each run's safety cost it, from what `evaluate` or "
        "`demo` measured. The share of the tax removed needs the model before alignment and a "
        "naive run among them.",
    )
    report.add_argument("runs", nargs="+", help="run directories or results files")
    report.add_argument(
        "--out", type=_place, default=Path("report"), help="where the files go; default: report"
    )
    report.add_argument(
        "--matched-safety",
        type=float,
        help="safety score from which on the share of the tax removed is given; default: the naive "
        "run's, less 0.03",
    )
    report.set_defaults(run=_report)

    export = commands.add_parser(
        "export",
        help="the newest checkpoint of a run, finished or not, as a Hugging Face folder",
        description="Write the newest checkpoint of a run as a Hugging Face folder, also while it "
        "trains. Of a finished run, with its model card. Where the weights are rounded, what that "
        "leaves of the training is measured and reported.",
    )
    export.add_argument("run_dir", type=Path, metavar="RUN", help="the run directory")
    export.add_argument("dir", type=_place, metavar="DIR", help="the folder to write")
    export.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: as in the model that was trained; default: the run's "
        "export.dtype",
    )
    export.set_defaults(run=_export)

    merge = commands.add_parser(
        "merge",
        help="weight-space merge of two checkpoints",
        description="(1 - WEIGHT) of A and WEIGHT of B, tensor by tensor. With several weights, "
        "each result goes to its own folder OUT/WEIGHT.",
    )
    merge.add_argument("a", metavar="A", help="Hugging Face folder, hub id, or run directory")
    merge.add_argument("b", metavar="B", help="the same")
    merge.add_argument("--weight", type=float, nargs="+", required=True, help="share of B")
    merge.add_argument("--out", type=_place, required=True, help="the folder to write")
    merge.set_defaults(run=_merge)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _place(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give a folder")
    return Path(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**31 - 1}")
    return int(text)


def _setting(text: str) -> tuple[str, object]:
    """A setting KEY=VALUE, its value read as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    try:
        if not (key and equals):
            raise ValueError("the key or the = is missing")
        return key, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--judge: {text!r} is not KEY=VALUE ({reason}).") from error


def _train(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.config.file import schema_lines

    if parsed.keys:
        print("\n".join(schema_lines()))
        return
    overrides = [item for item in parsed.config if "=" in item and not os.path.isfile(item)]
    paths = [Path(item) for item in parsed.config if item not in overrides]
    if not paths:
        raise InputError(
            "train: name at least one configuration file, as in configs/smoke-sft.yaml."
        )

    logger.info("starting JAX")
    from ogpsa_jax.reporting.model_card import write_missing_card
    from ogpsa_jax.training import Hooks, train_stages
    from ogpsa_jax.training.rounding import rounding_lines

    hooks = Hooks(on_finish=write_missing_card)
    for summary in train_stages(paths, overrides, hooks=lambda _: hooks):
        print(f"{summary.name}: {summary.steps} steps in {summary.seconds} s")
        for name, after in summary.after.items():
            before = summary.before.get(name, math.nan)
            change, by = summary.change.get(name), ""
            if change is not None and (error := change.standard_error) is not None:
                by = f"  ({change.mean:+.4f}, standard error {error:.4f})"
            print(f"  {name}: {before:.4f} -> {after:.4f}{by}")
        print(f"  export: {summary.export}")
        for line in rounding_lines(summary.rounding) if summary.rounding else ():
            print(f"    {line}")


def _plan(parsed: argparse.Namespace) -> None:
    import json

    from ogpsa_jax.planning.devices import parse_target, prepare_compiler

    target = parse_target(parsed.on)
    prepare_compiler(target)
    from ogpsa_jax.config import load_config
    from ogpsa_jax.planning.plan import plan
    from ogpsa_jax.planning.text import plan_text

    path, *overrides = parsed.config
    found = plan(load_config(path, overrides), target, progress=True)
    print(json.dumps(found.as_dict(), indent=1) if parsed.json else plan_text(found))


def _demo(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.demo.recipe import Mode
    from ogpsa_jax.demo.run import run_demo

    size: Mode = "quick" if parsed.quick else "thorough" if parsed.thorough else "full"
    run_demo(parsed.out, size, parsed.seed)


def _evaluate(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.evaluation import ModelOptions, evaluate, results_text
    from ogpsa_jax.reporting.model_card import refresh_card
    from ogpsa_jax.runs import Naming

    results = evaluate(
        parsed.model,
        parsed.suite,
        parsed.out,
        options=ModelOptions(
            dtype=parsed.dtype,
            mesh=None if parsed.mesh is None else tuple(parsed.mesh),
            template=parsed.template,
            batch_size=parsed.batch_size,
        ),
        naming=Naming(parsed.label, parsed.method, parsed.stage),
        judge=dict(map(_setting, parsed.judge)),
    )
    if parsed.out is None:
        refresh_card(parsed.model)
    print(results_text(results))


def _report(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.reporting import report, text_table, to_mind

    records = report(parsed.runs, parsed.out, parsed.matched_safety)
    print(text_table(records, parsed.matched_safety))
    for note in to_mind(records):
        print(f"warning: {note}")
    print(f"written to {parsed.out}: report.html, pareto.png, report.csv, report.md")


def _export(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.reporting.model_card import write_model_card
    from ogpsa_jax.runs import RunDir
    from ogpsa_jax.training.export_checkpoint import export_checkpoint

    step, rounding = export_checkpoint(parsed.run_dir, parsed.dir, parsed.dtype)
    if RunDir(parsed.run_dir).summary_file.exists():
        write_model_card(parsed.run_dir, parsed.dir, rounding)
    print(f"{parsed.dir}: the weights of {parsed.run_dir} after step {step}")


def _merge(parsed: argparse.Namespace) -> None:
    from ogpsa_jax.models.merge import merge_pretrained

    if len(parsed.weight) == 1:
        outs = [parsed.out]
    elif (parsed.out / "config.json").exists():
        raise InputError(f"{parsed.out}: contains a model; write several merges to another folder.")
    else:
        outs = [parsed.out / f"{weight:g}" for weight in parsed.weight]
    merge_pretrained(parsed.a, parsed.b, parsed.weight, outs)
    for out in outs:
        print(out)


if __name__ == "__main__":
    sys.exit(main())

"""``ogpsa-jax evaluate``: a suite on a model, resumable item by item.

Every item's outcome is a line of ``items.jsonl``, under a key made of all it depends on: the
weights, the task's settings, the item. A stopped evaluation resumes with the items that
have no line; one with other weights or settings finds no line with its keys and starts again.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.items import Item, read_items
from ogpsa_jax.evaluation.language_model import LanguageModel, ModelOptions, open_model
from ogpsa_jax.evaluation.refusal import RULES, classify_refusal
from ogpsa_jax.evaluation.results import ANSWERS, NOT_ASKED, results_text, summary
from ogpsa_jax.evaluation.suite import (
    OverRefusalTask,
    RefusalTask,
    Suite,
    Task,
    load_suite,
)
from ogpsa_jax.evaluation.tasks import UNJUDGED, ItemOutcome, TaskResult, run_items, summarise
from ogpsa_jax.files import make_folder, only_writer, read_json
from ogpsa_jax.progress import Progress
from ogpsa_jax.runs import Naming, Provenance, find_run, named, write_scores

if TYPE_CHECKING:
    from ogpsa_jax.evaluation.judge import Judge

__all__ = ["ItemLog", "evaluate", "results_text", "run_suite"]


def evaluate(
    model: str | Path,
    suite: str | Path,
    output_dir: str | Path | None = None,
    *,
    options: ModelOptions | None = None,
    naming: Naming | None = None,
    judge: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a checkpoint; the same call resumes an earlier one that was stopped.

    Args:
      model: Hugging Face folder, hub id, or run directory (its export).
      suite: YAML file.
      output_dir: where ``items.jsonl`` and ``results.json`` go; by default ``evaluation/SUITE`` in
        the run directory, or ``evaluations/MODEL/SUITE`` where the model is of no run.
      options: how the model is loaded and called.
      naming: how reports call it; by default as its run says, or its folder.
      judge: settings that take the place of the suite's own under ``judge``.
      progress: show a bar on stderr.

    Returns:
      What ``results.json`` has; :func:`results_text` shows it. Where they lie in the directory of
      a run, ``ogpsa_jax.reporting.write_model_card`` puts the scores on the card of its export.

    Raises:
      InputError: a suite, a data file, a model or a judge that is not as it must be. All files are
        read and checked before the model is loaded.
    """
    options = options or ModelOptions()
    loaded = load_suite(suite, judge)
    items = {task.name: read_items(loaded, task) for task in loaded.tasks}
    names = named(model, naming or Naming())
    output = Path(output_dir) if output_dir is not None else _default_output(model, loaded)
    if output_dir is None and find_run(model) is None:
        _check_own_results(output, model)
    make_folder(output)
    with only_writer(output):
        asked = _judge(loaded, output)
        return run_suite(
            open_model(model, options),
            loaded,
            items,
            output,
            names,
            judge=asked,
            batch_size=options.batch_size,
            progress=progress,
        )


def run_suite(
    model: LanguageModel,
    suite: Suite,
    items: dict[str, list[Item]],
    output_dir: Path,
    names: Provenance,
    *,
    judge: "Judge | None" = None,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Score anything that is a :class:`LanguageModel`.

    Args:
      model: what is scored.
      suite: the tasks.
      items: of each task, by its name.
      output_dir: of ``items.jsonl`` and ``results.json``.
      names: how reports name the model.
      judge: for the tasks that ask for one.
      batch_size: items put to the model at a time.
      progress: show a bar on stderr.

    Returns:
      What ``results.json`` contains.

    Raises:
      ValueError: a task asks for a judge and there is none.
    """
    asking = [task.name for task in suite.tasks if getattr(task, "judge", False)]
    if asking and judge is None:
        raise ValueError(f"judge must be given, because task {asking[0]} needs one; got None")
    started = time.perf_counter()
    results: dict[str, TaskResult] = {}
    reused = 0
    with ItemLog(output_dir / "items.jsonl") as log, Progress(shown=progress) as bars:
        for task in suite.tasks:
            own = items[task.name]
            keys = _keys(model, suite, task, own, batch_size)
            reused += sum(key in log.outcomes for key in keys)
            _ask(model, suite, task, own, keys, log, bars, batch_size)
            if isinstance(task, RefusalTask | OverRefusalTask):
                _judge_items(task, own, keys, log, judge if task.judge else None, bars)
            results[task.name] = _result(task, keys, log, output_dir)
    asked = None if judge is None else judge.name
    chat = any(_chat(model, task) for task in suite.tasks)
    content, record = summary(model, suite, items, results, names, asked, chat)
    extra = {**content, "items_reused": reused, "seconds": round(time.perf_counter() - started, 1)}
    write_scores(output_dir / "results.json", [record], extra)
    return {**extra, "records": [record.model_dump()]}


def _ask(
    model: LanguageModel,
    suite: Suite,
    task: Task,
    items: Sequence[Item],
    keys: Sequence[str],
    log: "ItemLog",
    bars: Progress,
    batch_size: int,
) -> None:
    """Put those items of a task to the model that have no outcome yet."""
    bar = bars.bar(task.name, len(items), "items")
    for batch in _batches(task, keys, log, batch_size):
        given, seed = [items[i] for i in batch], _seed(suite, task) + batch[0]
        try:
            outcomes = run_items(model, task, given, _chat(model, task), seed)
        except ValueError as error:  # what the model cannot be asked
            raise InputError(
                f"task {task.name}, rows {given[0].id} to {given[-1].id}: {error}"
            ) from error
        log.add(task.name, [(items[i], keys[i]) for i in batch], outcomes)
        bar.at(sum(key in log.outcomes for key in keys))
    bar.at(len(items))


def _result(task: Task, keys: Sequence[str], log: "ItemLog", output_dir: Path) -> TaskResult:
    try:
        return summarise(task, [log.outcomes[key] for key in keys])
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{output_dir / 'items.jsonl'}: contains outcomes of task {task.name} that are "
            "none; remove the file, and the same command writes it again."
        ) from error


class ItemLog:
    """``items.jsonl``: appended to, each batch on disk before the next begins.

    Attributes:
      outcomes: by key; later lines of a key add to earlier ones.
    """

    def __init__(self, path: Path) -> None:
        self.outcomes: dict[str, ItemOutcome] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1  # a last line that was torn off is dropped
            for number, text in enumerate(content[:whole].split(b"\n")[:-1], start=1):
                try:
                    line = json.loads(text)
                    self.outcomes.setdefault(line["key"], {}).update(line)
                except (ValueError, RecursionError, TypeError, KeyError) as error:
                    raise InputError(
                        f"{path}, line {number}: not a line of an evaluation; remove the line or "
                        "the file."
                    ) from error
            with path.open("r+b") as file:
                file.truncate(whole)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "ItemLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(
        self, task: str, keyed: Sequence[tuple[Item, str]], outcomes: Sequence[ItemOutcome]
    ) -> None:
        """Write outcomes of items under their keys; returns when they are on disk."""
        for (item, key), outcome in zip(keyed, outcomes, strict=True):
            line = {"task": task, "item": item.id, "key": key, **outcome}
            self.outcomes.setdefault(key, {}).update(line)
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _default_output(model: str | Path, suite: Suite) -> Path:
    run = find_run(model)
    if run is not None:
        return run.dir.evaluation(suite.name)
    name = str(model).strip("/").replace("/", "--") if not Path(model).exists() else None
    return Path("evaluations") / (name or Path(model).resolve().name) / suite.name


def _check_own_results(output: Path, model: str | Path) -> None:
    """Refuse to replace the results of another folder of the same name."""
    if not (output / "results.json").exists():
        return
    other = str(read_json(output / "results.json", "remove it").get("model"))
    if Path(other).resolve() != Path(model).resolve():
        raise InputError(
            f"{output}: contains the results of {other}, a folder of the same name; give --out "
            "another place for these."
        )


def _judge(suite: Suite, output: Path) -> "Judge | None":
    if suite.judge is None or not any(getattr(task, "judge", False) for task in suite.tasks):
        return None
    from ogpsa_jax.evaluation.judge import Judge

    return Judge(suite.judge, output / "judge.jsonl")


def _chat(model: LanguageModel, task: Task) -> bool:
    wanted = getattr(task, "chat", False)
    return model.chats if wanted is None else bool(wanted)


def _seed(suite: Suite, task: Task) -> int:
    return suite.seed if task.seed is None else task.seed


def _keys(
    model: LanguageModel, suite: Suite, task: Task, items: Sequence[Item], batch_size: int
) -> list[str]:
    """A hash for each item of all that its outcome depends on."""
    shared = [ANSWERS, model.fingerprint, _chat(model, task), task.model_dump(exclude=NOT_ASKED)]
    keys = []
    for place, item in enumerate(items):
        # What is sampled depends on the seed and on the place in the batch.
        drawn = [_seed(suite, task), place, batch_size] if _samples(task) else []
        content = json.dumps([shared, drawn, item.__dict__], sort_keys=True)
        keys.append(hashlib.sha256(content.encode()).hexdigest()[:32])
    return keys


def _samples(task: Task) -> bool:
    return bool(getattr(task, "temperature", 0.0))


def _batches(task: Task, keys: Sequence[str], log: ItemLog, batch_size: int) -> Iterator[list[int]]:
    """Numbers of the items still to be put to the model, in batches."""
    if _samples(task):  # whole batches: a row's place decides what is drawn for it
        for start in range(0, len(keys), batch_size):
            batch = list(range(start, min(start + batch_size, len(keys))))
            if any(keys[i] not in log.outcomes for i in batch):
                yield batch
        return
    missing = [i for i, key in enumerate(keys) if key not in log.outcomes]
    for start in range(0, len(missing), batch_size):
        yield missing[start : start + batch_size]


def _judge_items(
    task: RefusalTask | OverRefusalTask,
    items: Sequence[Item],
    keys: Sequence[str],
    log: ItemLog,
    judge: "Judge | None",
    bars: Progress,
) -> None:
    """Judge the answers that this judge, or these rules, have not judged yet."""
    name = RULES if judge is None else judge.name
    outcomes = [log.outcomes[key] for key in keys]
    waiting = [
        i
        for i, outcome in enumerate(outcomes)
        if outcome.get("judge") != name or outcome.get("judgement") == UNJUDGED
    ]
    if not waiting:
        return
    bar = bars.bar(f"{task.name}, judge", len(keys), "answers")
    bar.at(len(keys) - len(waiting))

    def done(number: int, verdict: str) -> None:
        i = waiting[number]
        log.add(task.name, [(items[i], keys[i])], [{"judgement": verdict, "judge": name}])
        bar.more(1)

    pairs = [(items[i].prompt, str(log.outcomes[keys[i]]["answer"])) for i in waiting]
    if judge is not None:
        judge.classify(pairs, done)
        return
    for number, (_, answer) in enumerate(pairs):
        done(number, classify_refusal(answer))

"""``ogpsa-jax plan``: what a run needs of machines that need not be here."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ogpsa_jax.config import RunConfig
from ogpsa_jax.files import write_whole
from ogpsa_jax.planning.abstract import AbstractRun, Program, abstract_run
from ogpsa_jax.planning.devices import Target, planned_mesh
from ogpsa_jax.planning.flops import count_flops
from ogpsa_jax.planning.hlo import collectives
from ogpsa_jax.progress import Progress
from ogpsa_jax.training.mesh import check_batch, row_shards

_VERSION = 2  # of what is kept of a compilation
# What the names of operations say of why a collective is there; the first that fits counts.
_CAUSES = (
    ("projection", ("ogpsa_projection",)),
    ("head", ("lm_head",)),
    ("embedding", ("embed_tokens",)),
    ("parameters", ("rematted_computation",)),
    ("gradients", ("transpose(",)),
    ("parameters", ("layers",)),
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, on each device.

    Attributes:
      flops: operations in matrix products, loops counted as often as they run.
      arguments: bytes of what it takes.
      temporaries: bytes of what it needs in between.
      peak: bytes at the worst moment.
      sent: bytes that go over the network, by kind of collective and cause.
      seconds: lower bound of its time, see :func:`roofline`.
    """

    flops: float
    arguments: int
    temporaries: int
    peak: int
    sent: dict[str, dict[str, int]]
    seconds: float

    @property
    def bytes_sent(self) -> int:
        """Over the network, in all."""
        return sum(size for by_cause in self.sent.values() for size in by_cause.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      target: where.
      devices: how many.
      compiled_for: ``tpu``: these are the real compiler's figures; ``cpu``: estimates.
      mesh: sizes of the axes.
      memory: bytes of one device.
      held: bytes on each device between steps, by kind; the batch with what the initial model
        predicts on it.
      host: bytes in the memory of hosts: what ``ogpsa.offload`` moves there, for each device; and
        the initial model's predictions on the references, in every process.
      programs: by name: ``train step``, ``refresh``, ...
      activations: bytes of temporaries that grow with the micro-batch.
      fits: whether the worst program fits into memory.
      micro_batch_size: the largest that is predicted to fit; None where not even one row does.
      steps: of the whole run, at most; None where `train.steps` is open, and a source of the data
        does not say its `samples`.
      seconds: lower bound of the whole run, evaluations of sets that say their `samples` included.
      advice: what to change, where it does not fit.
    """

    target: str
    devices: int
    compiled_for: str
    mesh: dict[str, int]
    memory: float
    held: dict[str, int]
    host: dict[str, int]
    programs: dict[str, Compiled]
    activations: int
    fits: bool
    micro_batch_size: int | None
    steps: int | None
    seconds: float | None
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dataclasses.asdict(self)


def plan(
    config: RunConfig, target: Target, *, progress: bool = False, cache: Path | None = None
) -> Plan:
    """Compile what a run will run, from shapes alone, and add it up.

    :func:`ogpsa_jax.planning.devices.prepare_compiler` must have been called before anything else
    used JAX.

    Args:
      config: the run's settings; of ``model.path`` only ``config.json`` is read.
      target: the devices.
      progress: show it on stderr.
      cache: folder of what compilations gave; by default ``~/.cache/ogpsa_jax/plan``.

    Raises:
      InputError: the mesh does not fit the devices, or the batch the mesh.
    """
    mesh = planned_mesh(config.mesh, target)
    check_batch(config, mesh)
    run = abstract_run(config, mesh)
    share = (config.train.batch_size - config.reference_rows) // row_shards(mesh)
    micro = min(config.train.micro_batch_size, max(share, 1))
    other = max(micro // 2, 1) if micro > 1 else 2
    varied = _with_micro_batch(run, other)
    wanted: dict[str, Program | None] = {
        "train step": run.train_step(),
        f"train step, micro-batch {other}": varied.train_step() if other <= share else None,
        "refresh": run.refresh(),
        "span of inputs": run.span_inputs(),
        "evaluation batch": run.evaluation(),
        "reference model batch": run.reference_model_pass(),
    }
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ogpsa_jax"
    programs = {}
    with Progress("plan", shown=progress) as shown:
        bar = shown.bar("", sum(program is not None for program in wanted.values()), "programs")
        for name, program in wanted.items():
            if program is not None:
                shown.doing(f"compiling the {name}")
                programs[name] = _compiled(program, target, folder / "plan")
                bar.more(1)
    step = programs["train step"]
    second = programs.pop(f"train step, micro-batch {other}", None)
    row = 0.0
    if second is not None:
        row = max((step.temporaries - second.temporaries) / (micro - other), 0.0)
    held = bytes_by_kind(run)
    largest = _largest_micro_batch(step, row, micro, share, target)
    peak = max(program.peak for program in programs.values())
    steps = steps_of(config)
    return Plan(
        target=target.name,
        devices=target.count,
        compiled_for=target.compiled_for,
        mesh=dict(mesh.shape),
        memory=target.device.memory,
        held=held,
        host=bytes_on_hosts(run),
        programs=programs,
        activations=round(row * micro),
        fits=peak <= target.device.memory,
        micro_batch_size=largest,
        steps=steps,
        seconds=None if steps is None else _whole_run(config, programs, steps, row_shards(mesh)),
        advice=_advice(config, held, programs, largest, target),
    )


def _with_micro_batch(run: AbstractRun, rows: int) -> AbstractRun:
    train = run.config.train.model_copy(update={"micro_batch_size": rows})
    return dataclasses.replace(run, config=run.config.model_copy(update={"train": train}))


def steps_of(config: RunConfig) -> int | None:
    """Optimizer steps of a run, at most (packed rows are fewer); None where rows are unknown."""
    if config.train.steps is not None:
        return config.train.steps
    rows = [section.samples for section in config.data.train]
    weights = {section.weight for section in config.data.train}
    if any(count is None for count in rows) or (len(rows) > 1 and weights != {1.0}):
        return None
    own = config.train.batch_size - config.reference_rows
    return math.ceil(config.train.epochs * sum(count or 0 for count in rows) / own)


def bytes_on_hosts(run: AbstractRun) -> dict[str, int]:
    """Bytes in the memory of hosts; see :class:`Plan`."""
    found = {}
    moved = [leaf for leaf in jax.tree.leaves(run.state) if _is_offloaded(leaf)]
    if moved:
        found["offloaded state, a device"] = sum(map(_shard_bytes, moved))
    if predictions := run.predictions():
        found["predictions on references, a process"] = predictions
    return found


def _is_offloaded(leaf: Any) -> bool:
    return leaf.sharding.memory_kind not in (None, "device")


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize)


def bytes_by_kind(run: AbstractRun) -> dict[str, int]:
    """Bytes on each device between steps: parameters, moments, basis, others, the batch."""
    found = {"parameters": 0, "moments": 0, "basis": 0, "others": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path((run.state, run.network.frozen)):
        if _is_offloaded(leaf):
            continue
        name = jax.tree_util.keystr(path)
        kind = "others"
        if ".opt_state" not in name and ".at_refresh" not in name:
            kind = "parameters"
        elif ".basis" in name or ".metric" in name:
            kind = "basis"
        elif ".mu" in name or ".nu" in name:
            kind = "moments"
        found[kind] += _shard_bytes(leaf)
    found["batch"] = sum(map(_shard_bytes, jax.tree.leaves(run.train_step().args[2:])))
    return found


def _compiled(program: Program, target: Target, cache: Path) -> Compiled:
    """The figures of a program, kept under a digest of it and of the compiler."""
    lowered = program.call.lower(*program.args)
    compiler = importlib.metadata.version("libtpu") if target.compiled_for == "tpu" else "cpu"
    key = [_VERSION, target.name, target.count, compiler, jax.__version__, lowered.as_text()]
    kept = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    if kept.exists():
        return Compiled(**json.loads(kept.read_text(encoding="utf-8")))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    sent: dict[str, dict[str, int]] = {}
    for one in collectives(compiled.as_text()):
        by_cause = sent.setdefault(one.kind, {})
        cause = cause_of(one.scope)
        by_cause[cause] = by_cause.get(cause, 0) + one.size * one.times
    flops = count_flops(program.call, *program.args) / target.count
    found = Compiled(
        flops=flops,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        sent=sent,
        seconds=0.0,
    )
    found = dataclasses.replace(found, seconds=roofline(found, target))
    write_whole(kept, json.dumps(dataclasses.asdict(found)))
    return found


def cause_of(scope: str) -> str:
    """Why a collective is there, by the names of the code that it is from."""
    return next((cause for cause, words in _CAUSES if any(w in scope for w in words)), "other")


def roofline(program: Compiled, target: Target) -> float:
    """Seconds that a program takes at least.

    The longest of three, as if they overlapped wholly: its operations at the device's published
    rate for bfloat16, what it takes and leaves read once from memory, and what it sends at the
    published rate of the network. Real programs reach a half of it, or two thirds.
    """
    device = target.device
    return max(
        program.flops / device.flops,
        program.arguments / device.memory_bandwidth,
        program.bytes_sent / device.network_bandwidth,
    )


def _largest_micro_batch(
    step: Compiled, row: float, micro: int, share: int, target: Target
) -> int | None:
    fixed = step.peak - row * micro
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    fitting = [size for size in sizes if fixed + row * size <= target.device.memory]
    return max(fitting, default=None)


def _whole_run(config: RunConfig, programs: dict[str, Compiled], steps: int, shards: int) -> float:
    seconds = steps * programs["train step"].seconds
    interval = config.ogpsa.refresh.every if config.refreshes and config.ogpsa.refresh else None
    if "refresh" in programs and interval:
        seconds += math.ceil(steps / interval) * programs["refresh"].seconds
    if "span of inputs" in programs:
        seconds += programs["span of inputs"].seconds
    own = config.train.micro_batch_size * shards
    held_out = [section.samples for section in config.data.eval.values()]
    batches = sum(math.ceil(count / own) for count in held_out if count)
    times = 2 + (steps // config.train.eval_every if config.train.eval_every else 0)
    seconds += times * batches * programs["evaluation batch"].seconds
    if "reference model batch" in programs:
        pairs = sum(section.samples or 0 for section in config.data.train)
        seconds += math.ceil(pairs / own) * programs["reference model batch"].seconds
    return seconds


def _advice(
    config: RunConfig,
    held: dict[str, int],
    programs: dict[str, Compiled],
    micro: int | None,
    target: Target,
) -> list[str]:
    if all(program.peak <= target.device.memory for program in programs.values()):
        return []
    found = []
    if micro is not None and micro < config.train.micro_batch_size:
        found.append(f"train.micro_batch_size: {micro}")
    if config.train.remat != "full":
        found.append("train.remat: full")
    if config.train.loss_chunk > 128:
        found.append(f"train.loss_chunk: {config.train.loss_chunk // 2}")
    if config.projects and held["basis"] > held["parameters"] / 4:
        if config.ogpsa.basis_dtype is None and config.model.param_dtype == "float32":
            found.append("ogpsa.basis_dtype: bfloat16")
        found.append(f"ogpsa.rank below {config.ogpsa.rank}")
    if target.count > config.mesh.tensor * config.mesh.fsdp > 0:
        found.append("a larger mesh.fsdp")
    return [*found, "more devices"]

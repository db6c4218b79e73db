"""A plan for a terminal."""

from tabulate import tabulate

from ogpsa_jax.planning.plan import Plan


def plan_text(found: Plan) -> str:
    """The plan for a terminal."""
    parts = [
        f"{found.target}: {found.devices} devices, mesh "
        + ", ".join(f"{axis} {size}" for axis, size in found.mesh.items()),
        *(
            _table(where, [(kind, _gib(size)) for kind, size in sizes.items()])
            for where, sizes in (("on each device", found.held), ("on hosts", found.host))
            if sizes
        ),
        tabulate(
            [
                (
                    name,
                    _gib(program.temporaries),
                    _gib(program.peak),
                    f"{program.flops / 1e12:,.2f}",
                    _gib(program.bytes_sent),
                    f"{program.seconds:,.3g}",
                )
                for name, program in found.programs.items()
            ],
            ["each device", "temporaries", "peak", "TFLOP", "sent", "seconds, at least"],
            disable_numparse=True,
            colalign=("left", *("right",) * 5),
        ),
        _table("a step sends for", [(cause, _gib(size)) for cause, size in _causes(found)]),
    ]
    largest = found.micro_batch_size or "none"
    lines = [
        f"activations of the micro-batch: {_gib(found.activations)}; the largest "
        f"train.micro_batch_size that is predicted to fit: {largest}"
    ]
    if found.seconds is None:
        lines.append(
            "the whole run: set train.steps, or samples of every source, and its time is added up"
        )
    else:
        hours = found.seconds / 3600
        lines.append(
            f"the whole run, {found.steps:,} steps: at least {hours:,.2f} h, "
            f"{hours * found.devices:,.1f} device-hours"
        )
    lines.append(
        "time: the longest of operations, memory and network at their published rates, wholly "
        "overlapped; real runs take up to twice as long"
    )
    if found.compiled_for == "cpu":
        lines.append(
            "memory: an estimate by the compiler for CPUs, which contains bfloat16 in float32"
        )
    worst = max(program.peak for program in found.programs.values())
    fits = "fits" if found.fits else f"does not fit; try {', or '.join(found.advice)}"
    lines.append(f"{_gib(worst)} of {_gib(found.memory)}: {fits}")
    return "\n\n".join([*parts, "\n".join(lines)])


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    return str(tabulate(rows, [title, ""], disable_numparse=True, colalign=("left", "right")))


def _causes(found: Plan) -> list[tuple[str, int]]:
    causes: dict[str, int] = {}
    for by_cause in found.programs["train step"].sent.values():
        for cause, size in by_cause.items():
            causes[cause] = causes.get(cause, 0) + size
    return sorted(causes.items(), key=lambda item: -item[1])


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"

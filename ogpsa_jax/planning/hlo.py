"""What a compiled program sends between devices, read from its text.

The text contains a loop's body once; here it counts as often as the loop runs.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "bf16": 2, **{f"{k}{8 * n}": n for k in "sufc" for n in (1, 2, 4, 8, 16)}}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_KNOWN = re.compile(r'known_trip_count"?: ?\{"?n"?: ?"?(\d+)')


class Instruction(NamedTuple):
    """A line of a computation."""

    root: bool
    type: str
    operation: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Their names; a constant's value."""
        return re.findall(r"%?([\w.\-]+)", re.sub(r"/\*.*?\*/", "", self.rest.split(")")[0]))


class Collective(NamedTuple):
    """A collective, and how often a step runs it."""

    kind: str
    size: int  # bytes on one device, of the input or the output, whichever is larger
    array: str  # as the program prints its result's type
    scope: str  # names of the code that it is from
    times: int


Computation = dict[str, Instruction]


def collectives(text: str) -> list[Collective]:
    """All collectives of a program that is printed as `text`."""
    computations, entry = _read(text)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        own = computations[name]
        for one in own.values():
            kind = one.operation.removesuffix("-start")
            if kind in KINDS:
                into = sum(_bytes(own[x].type) for x in one.operands if x in own)
                out = _bytes(one.type) - (into if one.operation.endswith("-start") else 0)
                scope = re.search(r'op_name="([^"]*)"', one.rest)
                if "all-reduce-scatter" in name:  # how TPU programs write one
                    kind = "reduce-scatter"
                array = re.sub(r"\{.*?\}", "", one.type)
                found.append(
                    Collective(kind, max(into, out), array, scope[1] if scope else "", times)
                )
            again = times * (_trips(one, own, computations) if one.operation == "while" else 1)
            for called in _called(one):
                if called in computations:
                    visit(called, again)

    visit(entry, 1)
    return found


def _read(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # ends a kernel's attributes
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current[match[2]] = Instruction(bool(match[1]), *match.groups()[2:])
    return computations, entry


def _called(one: Instruction) -> list[str]:
    lists = [re.findall(r"[\w.\-]+", names) for names in _LISTS.findall(one.rest)]
    return [*_CALLED.findall(one.rest), *(name for names in lists for name in names)]


def _bytes(array: str) -> int:
    found = _ARRAY.findall(array)
    return sum(_WIDTHS.get(k, 0) * math.prod(int(d) for d in s.split(",") if d) for k, s in found)


def _trips(loop: Instruction, own: Computation, computations: dict[str, Computation]) -> int:
    """How often a loop runs: a counter from a constant, by a constant, below a constant.

    Raises:
      ValueError: another kind of loop.
    """
    if known := _KNOWN.search(loop.rest):
        return int(known[1])
    condition, body = (
        computations[_first(rf"{key}=%?([\w.\-]+)", loop.rest)] for key in ("condition", "body")
    )
    test = _root(condition)
    if test.operation != "compare" or "direction=LT" not in test.rest:
        raise ValueError(f"a loop whose end is no bound of a counter: {test.rest[:200]}")
    counter, bound = test.operands
    place = int(_first(r"index=(\d+)", condition[counter].rest))
    after = body[_root(body).operands[place]]
    steps = [_constant(x, body) for x in after.operands] if after.operation == "add" else []
    start = _constant(own[loop.operands[0]].operands[place], own)
    step = next((x for x in steps if x is not None), None)
    end = _constant(bound, condition)
    if start is None or step is None or end is None:
        raise ValueError(f"a loop whose counter is not plain: {start}, {step}, {end}: {after}")
    return -(-(end - start) // step)


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"a loop that is printed in an unknown way: {text[:200]}")
    return match[1]


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.root)


def _constant(name: str, computation: Computation) -> int | None:
    """The value of an instruction that is a constant, or a copy of one."""
    one = computation[name]
    if one.operation in ("copy", "convert", "bitcast") and one.operands[0] in computation:
        return _constant(one.operands[0], computation)
    return int(one.operands[0]) if one.operation == "constant" else None

"""What a compiled program sends: the collectives of an HLO text, each as often as its loops run it.

`Compiled.cost_analysis()` counts the body of a loop once, so the text is walked here from its entry. Bytes are those
that come into one device, by the usual ring algorithms, n devices in a group:

    all-gather            result (n - 1) / n          reduce-scatter      operand (n - 1) / n
    all-reduce            2 operand (n - 1) / n       all-to-all          operand (n - 1) / n
    collective-permute    operand: what a gather or a scatter becomes where XLA interleaves it with a product

Where libtpu takes a collective apart, a piece beside each of several products, every piece names all of it, under one
channel: it is counted once.
"""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[suf]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass
class Traffic:
    """Bytes into one device in one run of the program.

    Attributes:
      bytes: by kind of collective. counts: how often one of that kind runs.
      unknown: collectives in loops whose length the text does not tell; they are counted once.
    """

    bytes: dict[str, float]
    counts: dict[str, int]
    unknown: list[str]

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def traffic(text: str) -> Traffic:
    """Of `Compiled.as_text()`. Raises ValueError for a text without an entry."""
    computations, entry = _computations(text)
    found = Traffic(dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0), [])
    _walk(entry, 1, True, computations, found, set())
    return found


def _computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """{computation: {instruction: what stands behind its `=`}}, and the name of the entry. The root of a computation
    is also there as "ROOT"."""
    computations: dict[str, dict[str, str]] = {}
    current, entry = None, None
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and not line.startswith(" "):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":  # a kernel's own text may begin lines with one
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current[instruction[1]] = instruction[2]
            if line.lstrip().startswith("ROOT "):
                current["ROOT"] = instruction[2]
    if entry is None:
        raise ValueError("this is no text of an HLO module: it has no entry")
    return computations, entry


def _walk(name: str, times: int, known: bool, computations: dict, found: Traffic, channels: set[str]) -> None:
    """channels: those of the collectives that were counted in this run of the loop."""
    for instruction, said in computations[name].items():
        if instruction == "ROOT":
            continue
        opcode = _opcode(said)
        if opcode == "while":
            condition, body = (re.search(rf"\b{part}=%?([\w.\-]+)", said)[1] for part in ("condition", "body"))
            trips = _trips(said, computations[condition], computations[body])
            _walk(body, times * (trips or 1), known and trips is not None, computations, found, set())
            continue
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"\bchannel_id=(\d+)", said)
            if channel and channel[1] in channels:
                continue
            channels |= {channel[1]} if channel else set()
            received = _received(kind, said, opcode != kind, computations[name])
            if received:
                found.bytes[kind] += times * received
                found.counts[kind] += times
                if not known:
                    found.unknown.append(instruction)
        elif called := _CALLED.search(said):
            for other in _NAME.findall(called[1]):
                if other in computations:
                    _walk(other, times, known, computations, found, channels)


def _opcode(said: str) -> str:
    """`f32[8]{0} add(%a, %b), ...` -> add; the type of a tuple has brackets of its own."""
    if said.startswith("("):
        depth = 0
        for at, c in enumerate(said):
            depth += (c == "(") - (c == ")")
            if not depth:
                said = said[at + 1 :]
                break
    match = re.match(r"\s*(?:\S+ )?([a-z][a-z\-]*)\(", said)
    return match[1] if match else ""


def _trips(said: str, condition: dict[str, str], body: dict[str, str]) -> int | None:
    """How often a loop runs, as XLA says it, or from `counter < constant` and what the body adds to the counter."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', said):
        return int(known[1])
    compare = re.search(r"compare\((.*?)\), direction=(LT|GT|NE)", condition.get("ROOT", ""))
    if not compare:
        return None
    limit = counter = None
    for name in _NAME.findall(compare[1]):
        of = condition.get(name, "")
        if constant := re.search(r"\bconstant\((\d+)\)", of):
            limit = int(constant[1])
        elif element := re.search(r"get-tuple-element\(.*?\), index=(\d+)", of):
            counter = int(element[1])
    if limit is None or counter is None:
        return None
    return math.ceil(limit / _step(counter, body))


def _step(counter: int, body: dict[str, str]) -> int:
    """What the body of a loop adds to its counter; 1 where that is not plainly written."""
    result = body.get("ROOT", "")
    at = result.find(" tuple(")
    operands = _NAME.findall(result[at : result.find(")", at)]) if at >= 0 else []
    if counter >= len(operands):
        return 1
    added = re.search(r"\badd\((.*?)\)", body.get(operands[counter], ""))
    for name in _NAME.findall(added[1]) if added else ():
        if constant := re.search(r"\bconstant\((\d+)\)", body.get(name, "")):
            return int(constant[1])
    return 1


def _received(kind: str, said: str, start: bool, computation: dict[str, str]) -> float:
    """Bytes that one collective brings into a device."""
    type_ = said[: said.index(f" {kind}")]
    arrays = [_size(*shape) for shape in _SHAPE.findall(type_)]
    if kind == "collective-permute":
        return arrays[0]
    if start and kind in ("all-gather", "reduce-scatter"):
        arrays = arrays[len(arrays) // 2 :]  # operands stand before results
    size, n = sum(arrays), _group(said)
    share = (n - 1) / n
    return {"all-gather": size, "reduce-scatter": size * n, "all-reduce": 2 * size, "all-to-all": size}[kind] * share


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(d) for d in shape.split(",") if d) * max(bits, 8) // 8


def _group(said: str) -> int:
    """Devices of one group, in the three ways in which XLA writes them."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", said):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", said):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=\w*mesh\[(.*?)\]\s*\{(.*?)\}", said):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"the groups of a collective cannot be read: {said[:300]}")

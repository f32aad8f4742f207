"""Network traffic of a compiled program: the collectives of its HLO text, multiplied by the trip counts of loops.

`Compiled.cost_analysis()` counts the body of a loop once, so this module walks the text from its entry. Bytes are those
received by one device with ring algorithms and n devices in a group:

    all-gather            result (n - 1) / n          reduce-scatter      operand (n - 1) / n
    all-reduce            2 operand (n - 1) / n       all-to-all          operand (n - 1) / n
    collective-permute    operand; XLA makes permutes of gathers and scatters that it interleaves with a product

libtpu may split a collective into pieces that run next to several products. Every piece has the full shape and the same
channel, so each channel is counted once.
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
    """Traffic into one device in one run of the program."""

    bytes: dict[str, float]  # by kind of collective
    counts: dict[str, int]  # executions by kind
    unknown: list[str]  # collectives in loops whose length is not in the text; counted once


def traffic(text: str) -> Traffic:
    """Return the traffic of a `Compiled.as_text()`. Raises ValueError if there is no ENTRY computation."""
    computations, entry = _computations(text)
    result = Traffic(dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0), [])
    _walk(entry, 1, True, computations, result, set())
    return result


def _computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Return {computation: {instruction: text after its `=`}} and the name of the entry.

    The root of a computation is also listed as "ROOT".
    """
    computations: dict[str, dict[str, str]] = {}
    current, entry = None, None
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and not line.startswith(" "):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":  # lines of a kernel's own text may start with one
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current[instruction[1]] = instruction[2]
            if line.lstrip().startswith("ROOT "):
                current["ROOT"] = instruction[2]
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _walk(name: str, times: int, known: bool, computations: dict, result: Traffic, channels: set[str]) -> None:
    """Add the collectives of a computation that runs `times` times.

    `known` is True if all enclosing loops have a known length; `channels` were counted in the enclosing loop body.
    """
    for instruction, text in computations[name].items():
        if instruction == "ROOT":
            continue
        opcode = _opcode(text)
        if opcode == "while":
            condition, body = (re.search(rf"\b{part}=%?([\w.\-]+)", text)[1] for part in ("condition", "body"))
            trips = _trips(text, computations[condition], computations[body])
            _walk(body, times * (trips or 1), known and trips is not None, computations, result, set())
            continue
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"\bchannel_id=(\d+)", text)
            if channel and channel[1] in channels:
                continue
            channels |= {channel[1]} if channel else set()
            received = _received(kind, text, opcode != kind)
            if received:
                result.bytes[kind] += times * received
                result.counts[kind] += times
                if not known:
                    result.unknown.append(instruction)
        elif called := _CALLED.search(text):
            for other in _NAME.findall(called[1]):
                if other in computations:
                    _walk(other, times, known, computations, result, channels)


def _opcode(text: str) -> str:
    """Return the opcode of an instruction: `f32[8]{0} add(%a, %b), ...` -> add."""
    match = re.search(r"\s([a-z][a-z0-9\-]*)\(", text)  # no type has a space before a word with a bracket
    return match[1] if match else ""


def _trips(text: str, condition: dict[str, str], body: dict[str, str]) -> int | None:
    """Return the trip count of a loop from XLA's annotation, or from `counter < constant` and the counter's step."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', text):
        return int(known[1])
    compare = re.search(r"compare\((.*?)\), direction=(LT|GT|NE)", condition.get("ROOT", ""))
    if not compare:
        return None
    limit = counter = None
    for name in _NAME.findall(compare[1]):
        operand = condition.get(name, "")
        if constant := re.search(r"\bconstant\((\d+)\)", operand):
            limit = int(constant[1])
        elif element := re.search(r"get-tuple-element\(.*?\), index=(\d+)", operand):
            counter = int(element[1])
    if limit is None or counter is None:
        return None
    return math.ceil(limit / _step(counter, body))


def _step(counter: int, body: dict[str, str]) -> int:
    """Return the number that a loop body adds to its counter, or 1 if the text does not show it."""
    result = body.get("ROOT", "")
    start = result.find(" tuple(")
    operands = _NAME.findall(result[start : result.find(")", start)]) if start >= 0 else []
    if counter >= len(operands):
        return 1
    added = re.search(r"\badd\((.*?)\)", body.get(operands[counter], ""))
    for name in _NAME.findall(added[1]) if added else ():
        if constant := re.search(r"\bconstant\((\d+)\)", body.get(name, "")):
            return int(constant[1])
    return 1


def _received(kind: str, text: str, start: bool) -> float:
    """Return the bytes that one collective sends into a device."""
    type_ = text[: text.index(f" {kind}")]
    arrays = [_size(*shape) for shape in _SHAPE.findall(type_)]
    if kind == "collective-permute":
        return arrays[0]
    if start and kind in ("all-gather", "reduce-scatter"):
        arrays = arrays[len(arrays) // 2 :]  # operands precede results
    size, n = sum(arrays), _group(text)
    share = (n - 1) / n
    return {"all-gather": size, "reduce-scatter": size * n, "all-reduce": 2 * size, "all-to-all": size}[kind] * share


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(d) for d in shape.split(",") if d) * max(bits, 8) // 8


def _group(text: str) -> int:
    """Return the number of devices in a group; XLA has three notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=\w*mesh\[(.*?)\]\s*\{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"cannot parse the replica groups of a collective: {text[:300]}")

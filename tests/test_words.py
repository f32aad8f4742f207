"""Comparison of answers outside a-z: identical answers score 1, opposite and different ones less."""

import itertools
import time
import unicodedata

import pytest

from input_pipeline.text.terms import Terms
from radfm_jax.evaluate import metrics, radbench, refusals, scoring
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.evaluate.radbench import Question
from radfm_jax.evaluate.words import words

# Every text differs in meaning from all others of its group.
DIFFERENT = [
    ("+", "-", "±", "++"),
    ("< 3 cm", "> 3 cm", "≤ 3 cm", "≥ 3 cm", "= 3 cm", "3 cm"),
    ("-50 HU", "50 HU", "500 HU", "5.0 HU"),
    ("3.5 cm", "35 cm", "3 cm, 5", "3/5 cm", "3:5 cm", "3 x 5 cm"),
    ("5 %", "5 mm", "5 cm", "5°", "5"),
    ("1,000", "1.001", "1"),
    ("HER2+", "HER2-"),
    ("(+)", "(-)"),
    ("up ↑", "up ↓"),
    ("WBC ▲", "WBC ▼", "WBC"),
    ("♀", "♂"),
    ("Ödem", "dem", "Odem"),
    ("右肺结节", "左肺结节", "肺结节"),
    ("うさぎ", "うなぎ"),
    ("ปอดขวา", "ปอดซ้าย"),
    ("폐렴 있음", "폐렴 없음"),
    ("перелом есть", "перелома нет"),
    ("يوجد كسر", "لا يوجد كسر"),
    ("की", "का"),  # differ in a combining mark only
    ("10⁶", "10^5", "106"),
    ("½", "1/3", "12"),
    ("Grade Ⅳ", "Grade Ⅲ"),
    ("?", "!"),
    ("☑ edema", "☐ edema", "☒ edema", "edema"),
    ("✓ edema", "✗ edema", "edema"),
]
# The same words in another order, which only `exact` sees.
TICKS = [
    ("■ Yes □ No", "□ Yes ■ No", "□ Yes □ No"),
    ("☑ Yes ☐ No", "☐ Yes ☑ No", "☐ Yes ☒ No"),
    ("■ Yes\n□ No", "□ Yes\n■ No"),
    ("● left ○ right", "○ left ● right"),
    ("◼ CT ◻ MR", "◻ CT ◼ MR"),
    ("✓ edema ✗ mass", "✗ edema ✓ mass"),
    ("✔ edema ✘ mass", "✘ edema ✔ mass"),
    ("✅ edema ❌ mass", "❌ edema ✅ mass"),
    ("[x] Yes [ ] No", "[ ] Yes [x] No"),
    ("⊠ Yes ☐ No", "☐ Yes ⊠ No"),
]
SAME = [
    ("-50 HU", "−50 HU", "－５０ HU"),
    ("3.5 cm", "3,5 cm", "３．５ｃｍ", "3.5cm"),
    (">= 3 cm", "≥ 3 cm", "≥3cm", "＞＝3 cm"),
    ("+/- 2", "± 2", "±2"),
    ("3 x 5 cm", "3x5 cm", "3 × 5 cm", "3×5cm"),
    ("5-10 mm", "5–10 mm", "5 — 10 mm"),
    ("1,000 HU", "1000 HU"),
    ("cm²", "cm2", "cm^2"),
    ("10⁶", "10^6"),
    ("1½", "1 1/2"),
    ("Ödem", unicodedata.normalize("NFD", "Ödem"), "ÖDEM"),
    ("٣ سم", "3 سم"),
    ("ＣＴ", "CT", "**ct**."),
    ("- Yes", "Yes.", "“yes”"),
    ("fibrosis", "ﬁbrosis", "fibro\u00adsis"),
    ("5 µm", "5 μm"),
    ("X-ray", "X\u2011ray", "x ray"),
    ("■ Yes □ No", "☑ Yes ☐ No", "⬛ Yes ⬜ No", "▪ Yes ▫ No"),
    ("■ Yes", "● Yes", "□ Yes", "- Yes"),  # list marks
    ("● Lungs clear\n○ no mass", "- Lungs clear\n  - no mass"),  # marks of two levels of a list
    ("✔\ufe0f Yes", "✔ Yes", "✓ Yes"),
    ("✘ Yes", "✗ Yes"),
]


@pytest.mark.parametrize("group", DIFFERENT, ids=lambda group: group[0])
def test_different_answers(group):
    for a, b in itertools.permutations(group, 2):
        assert metrics.exact(a, [b]) == 0, (a, b)
        if words(a) or words(b):
            assert metrics.rouge1(a, [b]) < 1, (a, b)
        assert metrics.bleu1(a, [b]) < 1, (a, b)
    for a in group:
        assert metrics.exact(a, [a]) == 1 and metrics.bleu1(a, [a]) == pytest.approx(1), a
        assert metrics.rouge1(a, [a]) == (1 if words(a) else 0), a


@pytest.mark.parametrize("group", TICKS, ids=lambda group: group[0])
def test_ticks_belong_to_their_words(group):
    for a, b in itertools.permutations(group, 2):
        assert metrics.exact(a, [b]) == 0, (a, b)


@pytest.mark.parametrize("group", SAME, ids=lambda group: group[0])
def test_spellings_of_one_answer(group):
    for a, b in itertools.permutations(group, 2):
        assert metrics.exact(a, [b]) == 1 and metrics.rouge1(a, [b]) == 1, (a, b, words(a), words(b))


def test_parts_of_chinese_count():
    """Three of four characters are shared, so precision and recall are 3/4."""
    assert metrics.rouge1("右肺结节", ["左肺结节"]) == pytest.approx(3 / 4)
    assert metrics.bleu1("右肺结节", ["左肺结节"]) == pytest.approx(3 / 4)


def test_plain_english_has_the_words_of_rouge_score():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "The heart isn't enlarged; T2-weighted images (2 of 3) of L4-L5 show Crohn's disease: a well-defined mass."
    assert words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_medical_words_keep_their_accents():
    terms = Terms(["ménière disease"])
    text = unicodedata.normalize("NFD", "Ménière disease")
    assert metrics.medical_words(text, terms) == metrics.medical_words("Meniere disease", terms)


@pytest.mark.parametrize("text", ["- ", "1", "1,", "-", "肺", "²", "1 x ", "( ", " "])
def test_words_take_linear_time(text):
    start = time.monotonic()
    words(text * 30_000 + "x")
    assert time.monotonic() - start < 5  # 0.1 s; a quadratic pattern takes minutes


# --- choices and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, choice", [("CT扫描", "CT"), ("ＣＴ scan", "CT"), ("Это МРТ (MRI)", "MRI"), ("ÖCT", None)]
)
def test_choices_in_text_of_other_scripts(answer, choice):
    names = {choice: radbench.NAMES[choice] for choice in radbench.CLOSED["modality"]}
    assert metrics.named_choice(answer, names) == choice


def test_difflib_reads_other_forms_of_letters():
    assert metrics.closest_choice("ＹＥＳ", ("yes", "no")) == "yes"
    assert metrics.closest_choice("Ｘ‑ｒａｙ", radbench.CLOSED["modality"]) == "X-ray"


YES_NO = [
    ("I cannot say.", None), ("I can't tell from this image.", None), ("I can\u2019t say if there is no mass.", None),
    ("I'm sorry, but I can't help with that.", None), ("As an AI, I cannot interpret medical images.", None),
    ("Unknown", None), ("Not sure.", None), ("N/A", None), ("It is not possible to determine this.", None),
    ("I do not know whether it is yes or no.", None), ("Cannot be determined.", None),
    ("No, I cannot see a mass.", "no"), ("I cannot be certain, but yes.", "yes"),
    ("I cannot say for sure. Yes.", "yes"),
    ("No", "no"), ("Yes, there is.", "yes"), ("Malignancy cannot be excluded: yes", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("answer, predicted", YES_NO)
def test_a_refusal_is_neither_yes_nor_no(answer, predicted):
    question = Question("x/1", "diagnosis", "x", "Q?", (predicted or "no",), closed=("yes", "no"))
    (scored,) = scoring.score([question], {"x/1": RecordedAnswer(answer)}, Terms(["mass"]))
    assert scored.predicted == predicted and scored.refused == (predicted is None)
    assert scored.values["named"] == (predicted is not None)
    if scored.refused:
        assert scored.closest is None and scored.values["accuracy"] == 0 and not scored.error
        assert metrics.closest_choice("I cannot say.", ("yes", "no")) == "no"  # what a refusal would count as


@pytest.mark.parametrize(
    "answer, refused",
    [
        ("I'm unable to interpret this image.", True),
        ("Sorry, I cannot help with that.", True),
        ("Unfortunately, I can't provide a report.", True),
        ("As a language model, I cannot diagnose.", True),
        ("Heart size is normal. The apex cannot be assessed.", False),
        ("Small effusion; malignancy cannot be excluded.", False),
        ("The left lung base, which I cannot assess, is obscured.", False),
        ("No mass.", False),
    ],
)
def test_refusals_of_open_questions(answer, refused):
    assert (refusals.answer_without_refusal(answer, None, words(answer)) is None) == refused


def test_refusals_are_counted():
    questions = [Question(f"x/{i}", "diagnosis", "x", "Q?", ("no",), closed=("yes", "no")) for i in range(4)]
    given = ["No", "I cannot say.", "no", ""]
    answers = {q.row_id: RecordedAnswer(text) for q, text in zip(questions, given, strict=True)}
    answers["x/2"] = RecordedAnswer("I won't.", refused=True)
    scored = scoring.score(questions, answers, Terms(["mass"]))
    row = scoring.score_rows("m", scored, resamples=5, seed=0, by_study=False)[0]
    assert (row.questions, row.failed, row.refused) == (4, 1, 2)
    assert row.metrics["named"].value == row.metrics["accuracy"].value == 1 / 4
    assert list(row.metrics)[0] == "named"

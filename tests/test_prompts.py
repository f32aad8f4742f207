"""Prompts: complete, checked when loaded, drawn with the generator that is passed in."""

import copy

import numpy as np
import pytest

from input_pipeline.datasets import prompts


def test_every_group_has_ten_sentences_and_its_placeholder():
    groups = prompts.load()
    assert groups.keys() == prompts.GROUPS.keys()
    for name, sentences in groups.items():
        assert len(set(sentences)) == len(sentences) >= 10, name
        for sentence in sentences:
            assert sentence.count("{") == sentence.count("}") == (prompts.GROUPS[name] is not None), sentence


def test_spines_and_breasts_are_not_asked_about_the_chest():
    """Each region has its own sentences, and none names an organ of another region."""
    chest = ("lung", "chest", "thorax", "thoracic", "heart", "pulmon", "cardi")
    groups = prompts.load()
    for kind in ("open", "judge"):
        regions = {r: set(groups[f"diagnosis_{kind}_{r}"]) for r in ("cxr", "pcxr", "mammo", "spine")}
        assert len(set.union(*regions.values())) == sum(map(len, regions.values()))
        for region in ("mammo", "spine"):
            assert not [s for s in regions[region] for w in chest if w in s.lower()]
        assert all(any(w in s.lower() for w in chest) or "radiograph" in s for s in regions["cxr"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: g.pop("rationale"), "rationale is missing"),
        (lambda g: g.update(extra=["a"] * 10), "extra is unknown"),
        (lambda g: g["report"].__setitem__(0, g["report"][1]), "all different"),
        (lambda g: g.update(report=g["report"][:9]), "at least 10 sentences are required"),
        (lambda g: g["modality_judge"].__setitem__(0, "Is it {modalty}?"), "{modalty}"),
        (lambda g: g["modality_judge"].__setitem__(0, "Is it CT?"), "expected {modality} once"),
        (lambda g: g["modality_open"].__setitem__(0, "Is it {modality}?"), "expected no placeholder"),
        (lambda g: g["modality_open"].__setitem__(0, "A {"), "A {"),
        (lambda g: g["modality_open"].__setitem__(0, "<image-1> What?"), "image mark"),
        (lambda g: g.update(report="text"), "must be a list"),
    ],
)
def test_problems_of_the_file_are_named(change, message):
    groups = copy.deepcopy({k: list(v) for k, v in prompts.load().items()})
    prompts.check_prompts(groups)
    change(groups)
    with pytest.raises(ValueError) as error:
        prompts.check_prompts(groups, "prompts.json")
    assert message in str(error.value) and "prompts.json" in str(error.value)


def test_draw_fills_in_and_reaches_every_sentence():
    rng = np.random.default_rng(0)
    drawn = {prompts.draw("diagnosis_judge_spine", rng, disease="a {disease} {0}") for _ in range(400)}
    assert drawn == {s.replace("{disease}", "a {disease} {0}") for s in prompts.load()["diagnosis_judge_spine"]}
    again = [prompts.draw("report", np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]

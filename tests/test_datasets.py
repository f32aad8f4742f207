"""The adapters: tables in the published layouts -> samples, and what each must refuse or never do."""

import csv
import json
import pathlib
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from input_pipeline.datasets import FAMILIES, TableError, diseases, modalities, open_dataset, sample_rng
from input_pipeline.datasets.sentences import closed, join, sentences, shorten, without_sizes
from input_pipeline.samples import ROLES, TASKS, RowError, Scan, Text


def write_csv(file: pathlib.Path, header, *rows) -> pathlib.Path:
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def write_json(file: pathlib.Path, value) -> pathlib.Path:
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def draws(dataset, i=0, n=200, seed=0):
    return [dataset.sample(i, sample_rng(seed, epoch, dataset.name, dataset.row_id(i))) for epoch in range(n)]


def texts(sample, role):
    return [p.text for p in sample.parts if isinstance(p, Text) and p.role == role]


def answer(sample) -> str:
    return texts(sample, "response")[0]


def shape(sample) -> str:
    """ "sir": scan, instruction, response; c context, n interleaved text."""
    return "".join("s" if isinstance(p, Scan) else {"interleaved": "n"}.get(p.role, p.role[0]) for p in sample.parts)


VQA_HEADER = ("img_root_dir", "Figure_path", "Question", "Answer")
CASE = {
    "pre": "Sudden chest pain.",
    "pat": "Age: 40 years Gender: Male",
    "npy_path": "v/1.npy",
    "finding": "A 3 x 2.5 cm mass. No effusion.",
    "impression": "Lung abscess",
    "title": "Lung abscess",
    "articles": ["Lung abscess", "Pulmonary cavity"],
    "radiographic_features": ["CT: cavity with a level.", "X-ray: same"],
}


def volumes(root: pathlib.Path, name: str, scans: int):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    np.save(root / name, np.zeros((scans, 3, 4, 4, 2), np.uint8))


@pytest.fixture
def every(tmp_path):
    """One small data set of each family, with real files where a header is looked at: family -> fields."""
    root = tmp_path
    volumes(root, "v/1.npy", 2)
    (root / "img").mkdir()
    Image.new("L", (4, 4)).save(root / "img" / "a.png")
    paper = [{"text": "First sentence.", "img_ref": []}, {"text": "As shown in Fig. 1, it grows.", "img_ref": ["f1"]}]
    write_json(root / "PMC77.json", paper)
    vqa = write_csv(root / "vqa.csv", VQA_HEADER, ("img", "a.png", 'Is "it", so\nto say, big?', "yes, 2.5 cm"))
    open_table = write_csv(root / "open.csv", ("image_path", "label"), ("img/a.png", "Edema, Pneumothorax"))
    cases = write_json(root / "cases.json", [CASE])
    jsonl = root / "own.jsonl"
    jsonl.write_text(
        '{"id": "a", "task": "report", "scans": ["img/a.png"], "instruction": "<image-1> Report?", "response": "X"}\n'
    )
    tables = {
        "pmc_inline": write_csv(root / "inline.csv", ("PMC_path",), ("PMC77.json",)),
        "pmc_oa": write_csv(root / "oa.csv", ("Figure_path", "Caption"), ("PMC12_f.jpg", "CT, axial.")),
        "pmc_casereport": write_csv(
            root / "case.csv",
            ("PMC_id", "img_ref", "context", "question", "answer"),
            ("PMC5", "['F1', 'F2']", "A man came.", "Q: What is it?", "A: An abscess."),
        ),
        "pmc_vqa": vqa,
        "vqa_rad": vqa,
        "slake": vqa,
        "mimic_cxr": write_csv(root / "mimic.csv", ("image_path", "label"), ("p10/p10000032/s5/x.jpg", "No\nchange.")),
        "cxr_mix": open_table,
        "vindr_pcxr": open_table,
        "vindr_mammo": open_table,
        "vindr_spinexr": open_table,
        "diagnosis": open_table,
        "mpx_single": write_csv(
            root / "single.csv", ("name", "type", "context"), ("MPX1_a.png", "modality", "CT - noncontrast")
        ),
        "mpx_multi": write_csv(
            root / "multi.csv",
            ("name", "type", "context", "history"),
            ("MPX1_a.png, MPX1_b.png", "ddx", "Cyst.", "nan"),
        ),
        "mpx_questions": write_csv(
            root / "q.csv",
            ("name", "question", "answer", "explanation"),
            ("MPX1_a.png", "Which?", "B", "Because."),
        ),
        "rad3d_caption": cases,
        "rad3d_rationale": cases,
        "rad3d_modality": write_csv(root / "modality.csv", ("image_path", "answer"), ("a.nii.gz", "MRI")),
        "rad3d_vqa": write_csv(
            root / "r3vqa.csv", ("image_path", "question", "answer"), ("v/1.npy", "Where?", "Left.")
        ),
        "jsonl": jsonl,
    }
    return {name: dict(table=table, root=root) for name, table in tables.items()}


def test_every_family_yields_sound_samples(every):
    """Known tasks and roles, texts without outer spaces or None, one response, scans below the root."""
    assert every.keys() == FAMILIES.keys() - {"tfds"}
    for name, fields in every.items():
        dataset = open_dataset(name, **fields)
        assert len(dataset) == 1 and dataset.problems == [] and dataset.fraction == 1.0
        for sample in draws(dataset, n=40):
            assert sample.dataset == name and sample.task in TASKS and sample.row_id == dataset.row_id(0)
            responses = texts(sample, "response")
            assert len(responses) == (sample.task != "interleaved")
            for part in sample.parts:
                if isinstance(part, Text):
                    assert part.role in ROLES and part.text == part.text.strip() != ""
                    assert not {"None", "nan", "NaN"} & set(part.text.replace(".", " ").split())
            assert set(sample.scans) <= set(dataset.scans(0)) and dataset.scans(0)
            assert all(not s.path.startswith("/") for s in sample.scans)


def test_a_row_is_a_function_of_its_generator_alone(every):
    """The same (seed, epoch, data set, row) gives the same sample whatever was drawn before; another epoch differs."""
    for name, fields in every.items():
        dataset = open_dataset(name, **fields)
        first = draws(dataset, n=12)
        again = open_dataset(name, **fields)
        assert (
            list(reversed([again.sample(0, sample_rng(0, e, name, again.row_id(0))) for e in reversed(range(12))]))
            == first
        )
        if name not in ("jsonl", "pmc_inline"):
            assert len(set(first)) > 1, name


def test_sample_rng_is_stable_and_separates_its_arguments():
    # Numbers of a first run, kept: a change of them changes every training run.
    assert sample_rng(0, 0, "vqa_rad", "1").integers(1 << 30, size=2).tolist() == [656068213, 247292239]
    keys = [
        (0, 0, "a", "1"),
        (1, 0, "a", "1"),
        (0, 1, "a", "1"),
        (0, 0, "b", "1"),
        (0, 0, "a", "2"),
        (0, 0, "a1", ""),
        (0, 11, "a", ""),
    ]
    assert len({sample_rng(*key).random() for key in keys}) == len(keys)


def test_open_dataset_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vqa_rad'"):
        open_dataset("vqarad", table="x", root=tmp_path)
    with pytest.raises(ValueError, match="'tabel' is unknown .did you mean 'table'.*'table' is needed"):
        open_dataset("vqa_rad", tabel="x", root=tmp_path)
    with pytest.raises(RowError, match="cannot be read"):
        open_dataset("vqa_rad", table="x", root=tmp_path)
    with pytest.raises(ValueError, match="fraction"):
        open_dataset("vqa_rad", table="x", root=tmp_path, fraction=0)


# Tables


def test_bad_rows_are_all_reported_and_quarantine_counts_them(tmp_path):
    """
    row   Figure_path   Question   Answer
    1     a.png         q          a           good
    2     a.png         (blank)    a           blank
    3     a.png         q          nan         nan
    4     three cells                          wrong number
    5     ../x.png      q          a           climbs
    6     a.png         q<NUL>     a           NUL
    7     a.png         q          a<bad>      not UTF-8
    8     (blank line)
    9     /etc/x.png    q          a           absolute
    10    b.png         "Is \n ok"  "a,b"       good, over two lines
    """
    file = tmp_path / "t.csv"
    file.write_bytes(
        b"\xef\xbb\xbfimg_root_dir,Figure_path,Question,Answer\r\n"
        b",a.png,q,a\r\n,a.png, ,a\r\n,a.png,q,nan\r\n,a.png,q\r\n,../x.png,q,a\r\n,a.png,q\x00,a\r\n"
        b',a.png,q,a\xff\r\n\r\n,/etc/x.png,q,a\r\n,b.png,"Is \nok","a,b"\r\n'
    )
    with pytest.raises(TableError) as error:
        open_dataset("vqa_rad", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [2, 3, 4, 5, 6, 7, 8, 9]
    reasons = (
        "Question is blank",
        "Answer is blank: 'nan'",
        "3 cells, but the header has 4",
        "climbs",
        "NUL",
        "UTF-8",
        "is blank",
        "root",
    )
    for problem, reason in zip(error.value.problems, reasons, strict=True):
        assert reason in problem.reason and problem.file == str(file) and problem.remedy
    assert all(f"row {r}: " in str(error.value) for r in range(2, 10)) and "8 bad rows, 2 good" in str(error.value)
    dataset = open_dataset("vqa_rad", table="t.csv", root=tmp_path, quarantine=True)
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["1", "10"]
    assert [p.row for p in dataset.problems] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert texts(draws(dataset, 1, 1)[0], "instruction") == ["Is \nok"] and answer(draws(dataset, 1, 1)[0]) == "a,b"


@pytest.mark.parametrize(
    "data, row, message",
    [
        (b"", 0, "empty"),
        (b"a,b\n1,2\n", 0, "column img_root_dir is missing"),
        (b"img_root_dir,Figure_path,Question,Answer\n", 0, "no rows"),
        (b"img_root_dir,Figure_path,Question,Answer,Answer\n,a,b,c,d\n", 0, "stands there twice"),
        (b"\xff\xfei\x00", 0, "UTF-16"),
        (b'img_root_dir,Figure_path,Question,Answer\n,a,b,c\n,a,"b,c\n,a,b,c\n', 2, "never closed"),
        (b"img_root_dir,Figure_path,Question,Answer\n,a,b," + b"x" * 1_000_001 + b"\n", 1, "more than 1000000"),
        (b'img_root_dir,Figure_path,Question,Answer\n,a,"b"c,d\n', 1, "expected after"),
    ],
)
@pytest.mark.parametrize("quarantine", [False, True])
def test_a_table_without_meaning_raises_even_in_quarantine(tmp_path, data, row, message, quarantine):
    (tmp_path / "t.csv").write_bytes(data)
    limit = csv.field_size_limit()
    with pytest.raises(RowError) as error:
        open_dataset("pmc_vqa", table="t.csv", root=tmp_path, quarantine=quarantine)
    assert error.value.row == row and message in str(error.value) and csv.field_size_limit() == limit


def test_split_language_strip_duplicates_and_study(tmp_path):
    rows = [
        ("/far/img", "a.jpg", "What?", "Left", "en", "train"),
        ("/far/img", "b.jpg", "什么?", "左", "zh", "train"),
        ("/far/img", "c.jpg", "What?", "Left", "en", "test"),
        ("/far/img", "a.jpg", "What?", "Left", "en", "train"),
    ]
    write_csv(tmp_path / "t.csv", (*VQA_HEADER, "q_lang", "split"), *rows)
    dataset = open_dataset("slake", table="t.csv", root=tmp_path, split="train", strip="/far")
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["1", "4"] and dataset.duplicates == [(4, 1)]
    assert dataset.left_out == {"q_lang 'zh'": 1, "split 'test'": 1}
    assert dataset.scans(0) == (Scan("img/a.jpg"),) and draws(dataset)[0].study_id == "img/a.jpg"
    write_csv(tmp_path / "u.csv", VQA_HEADER, *[r[:4] for r in rows])
    dataset = open_dataset("slake", table="u.csv", root=tmp_path, strip="/far", study=r"img/(\w)")
    assert dataset.left_out == {"not English": 1} and draws(dataset, 1)[0].study_id == "c"
    with pytest.raises(RowError, match="no row is left"):
        open_dataset("slake", table="t.csv", root=tmp_path, split="val", strip="/far")


@pytest.mark.parametrize(
    "path, study",
    [
        ("x/PMC123_F1.jpg", "PMC123"),
        ("files/p10/p10000032/s50414267/a.jpg", "p10000032"),
        ("train/patient00001/study1/v.jpg", "patient00001"),
        ("images/00000013_005.png", "00000013"),
        ("MPX1009_synpic1.png", "MPX1009"),
        ("other/x.png", "other/x.png"),
    ],
)
def test_studies_of_the_public_sets(tmp_path, path, study):
    write_csv(tmp_path / "t.csv", ("image_path", "label"), (path, "Report."))
    assert draws(open_dataset("mimic_cxr", table="t.csv", root=tmp_path), n=1)[0].study_id == study


@pytest.mark.parametrize(
    "bad", ["../a.png", "x/../../a.png", "/etc/passwd", "a\x00b", "..\\a.png", "C:/a.png", ".", "a\x1bb"]
)
def test_paths_that_leave_the_root_are_refused(tmp_path, bad):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_path", "label"), (bad, "Report.")])
    with pytest.raises(RowError) as error:
        open_dataset("mimic_cxr", table="t.csv", root=tmp_path)
    assert error.value.row == 1 and (str(tmp_path) in str(error.value) or "NUL" in str(error.value))


# Sentences


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


# Questions with a scan


def test_vqa_puts_the_scan_first_or_last_equally_often(every):
    shapes = Counter(shape(s) for s in draws(open_dataset("vqa_rad", **every["vqa_rad"]), n=1000))
    assert shapes.keys() == {"sir", "isr"} and 440 < shapes["sir"] < 560  # 3.8 standard deviations


def test_rad3d_vqa_lists_the_scans_of_a_stack(every, tmp_path):
    dataset = open_dataset("rad3d_vqa", **every["rad3d_vqa"])
    assert dataset.scans(0) == (Scan("v/1.npy", 0), Scan("v/1.npy", 1))
    assert {shape(s) for s in draws(dataset)} == {"ssir", "issr"}
    np.save(tmp_path / "one.npy", np.zeros((1, 3, 4, 4, 2)))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "junk.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': 'f4', ")
    names = ("one.npy", "gone.npy", "text.npy", "junk.npy")
    write_csv(tmp_path / "t.csv", ("image_path", "question", "answer"), *[(n, "q", "a") for n in names])
    dataset = open_dataset("rad3d_vqa", table="t.csv", root=tmp_path)
    assert dataset.scans(0) == (Scan("one.npy"),)
    for i in (1, 2, 3):
        for call in (dataset.scans, lambda i, d=dataset: d.sample(i, np.random.default_rng(0))):
            with pytest.raises(RowError, match=f"t.csv, row {i + 1}: {names[i]}"):
                call(i)


def test_casereport_shortens_the_context_and_names_its_figures(tmp_path):
    context = "S1. S2. S3. S4. S5. S6 is 2.5 cm (Fig. 1). S7."
    header = ("PMC_id", "img_ref", "context", "question", "answer")
    write_csv(
        tmp_path / "t.csv",
        header,
        ("PMC5", "['F1', 'F2']", context, "Q: What?", "A: It."),
        ("PMC5", "['F1']", "", "Q:W", "A:I"),
    )
    dataset = open_dataset("pmc_casereport", table="t.csv", root=tmp_path)
    samples = draws(dataset)
    assert {shape(s) for s in samples} == {"cssir", "cissr"} and {shape(s) for s in draws(dataset, 1)} == {"sir", "isr"}
    assert texts(samples[0], "context") == ["S1. S4. S5. S6 is 2.5 cm (Fig. 1). S7."]
    assert (
        texts(samples[0], "instruction") == ["What?"] and answer(samples[0]) == "It." and samples[0].study_id == "PMC5"
    )
    assert samples[0].scans == (Scan("figures/PMC5_F1.jpg"), Scan("figures/PMC5_F2.jpg"))
    for bad in ("['F1'", "[]", "['../F1']", "[1]", "__import__('os')", "[['a']]", "[" * 5000):
        write_csv(tmp_path / "t.csv", header, ("PMC5", bad, context, "Q: What?", "A: It."))
        with pytest.raises(RowError, match="row 1: "):
            open_dataset("pmc_casereport", table="t.csv", root=tmp_path)
    write_csv(tmp_path / "t.csv", header, ("PMC5", "['F1']", context, "Q: ", "A: It."))
    with pytest.raises(RowError, match="question has nothing"):
        open_dataset("pmc_casereport", table="t.csv", root=tmp_path)


# PMC-Inline


def test_inline_window_figures_and_order(tmp_path):
    """120 sentences, f0..f5 at sentences 10, 11, 12, 13, 60, 60: at most 50 sentences and 3 figures, in order."""
    refs = {10: ["f0"], 11: ["f1"], 12: ["f2"], 13: ["f3", "f0"], 60: ["f4", "f5"]}
    write_json(tmp_path / "PMC9.json", [{"text": f"S{k}.", "img_ref": refs.get(k, [])} for k in range(120)])
    write_csv(tmp_path / "t.csv", ("PMC_path",), ("PMC9.json",))
    dataset = open_dataset("pmc_inline", table="t.csv", root=tmp_path)
    assert [s.path for s in dataset.scans(0)] == [f"figures/PMC9_f{k}.jpg" for k in range(6)]
    home = {f"figures/PMC9_f{f}.jpg": k for k, fs in reversed(refs.items()) for f in (x[1:] for x in fs)}
    starts = []
    for sample in draws(dataset, n=300):
        said = [int(w[1:-1]) for t in texts(sample, "interleaved") for w in t.split()]
        starts.append(said[0])
        assert said == list(range(said[0], said[0] + 50)) and len(sample.scans) == len(set(sample.scans)) <= 3
        for k, part in enumerate(sample.parts):
            if isinstance(part, Scan):
                following = next(p.text for p in sample.parts[k:] if isinstance(p, Text))
                # f0 comes back in sentence 13: in a window that begins at 11 or later it stands there.
                assert int(following.split()[0][1:-1]) in (
                    {home[part.path], 13} if "f0" in part.path else {home[part.path]}
                )
    assert min(starts) < 5 and max(starts) > 65
    always = draws(open_dataset("pmc_inline", table="t.csv", root=tmp_path, around_figure=1.0), n=200)
    never = draws(open_dataset("pmc_inline", table="t.csv", root=tmp_path, around_figure=0.0), n=200)
    assert all(s.scans for s in always) and not all(s.scans for s in never)
    chosen = Counter(s.path for sample in always for s in sample.scans)
    assert len(chosen) == 6


def test_inline_papers_are_checked(tmp_path):
    write_csv(tmp_path / "t.csv", ("PMC_path",), ("PMC1.json",))
    dataset = open_dataset("pmc_inline", table="t.csv", root=tmp_path)
    good = {"text": "a", "img_ref": []}
    cases = [
        (None, 0),
        ("{}", 0),
        ("[", 0),
        ("[NaN]", 0),
        (json.dumps([good, {"txt": 1}]), 2),
        ("[]", 0),
        ("[" * 100000, 0),
        (json.dumps([{"text": "a", "img_ref": ["../../etc/x"]}]), 1),
        ('[{"text": "\\ud800"}]', 1),
        ("[\xff]", 0),
    ]
    for content, row in cases:
        if content is not None:
            (tmp_path / "PMC1.json").write_bytes(content.encode("latin-1"))
        for call in (dataset.scans, lambda i: dataset.sample(i, np.random.default_rng(0))):
            with pytest.raises(RowError, match="PMC1.json") as error:
                call(0)
            assert error.value.row == row, content


# Diagnosis


def judged(sample) -> bool:
    return answer(sample) in ("yes", "no")


@pytest.mark.parametrize(
    "name, region",
    [
        ("cxr_mix", "cxr"),
        ("vindr_pcxr", "pcxr"),
        ("vindr_mammo", "mammo"),
        ("vindr_spinexr", "spine"),
        ("diagnosis", "general"),
    ],
)
def test_open_diagnosis_asks_in_the_words_of_its_region(every, name, region):
    from input_pipeline import prompts

    samples = draws(open_dataset(name, **every[name]))
    assert {answer(s) for s in samples} == {"Edema, Pneumothorax."} and {s.task for s in samples} == {"diagnosis"}
    assert {t for s in samples for t in texts(s, "instruction")} <= set(prompts.load()[f"diagnosis_open_{region}"])


def test_yes_no_tables_are_balanced_pair_by_pair(tmp_path):
    """Edema: present in x y, absent in a b c d e -> pairs (x | a c e) (y | b d); every image is reached, none twice."""
    rows = [(f"{i}.png", "Edema", "1") for i in "xy"] + [(f"{i}.png", "Edema", "0") for i in "abcde"]
    write_csv(tmp_path / "t.csv", ("image_path", "disease", "label"), *rows)
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path)
    assert [dataset.row_id(i) for i in range(4)] == [
        "edema/0/present",
        "edema/0/absent",
        "edema/1/present",
        "edema/1/absent",
    ]
    shares = [[s.path[0] for s in dataset.scans(i)] for i in range(len(dataset))]
    assert shares == [["x"], ["a", "c", "e"], ["y"], ["b", "d"]]
    seen = set()
    for i in range(4):
        # The pool does not shrink: 300 epochs later every image of the share is still drawn.
        samples = draws(dataset, i, 300)
        assert {answer(s) for s in samples} == {"no" if i % 2 else "yes"}
        assert all("edema" in texts(s, "instruction")[0] for s in samples)
        late = {s.scans[0].path[0] for s in samples[-60:]}
        assert late == set(shares[i])
        seen |= late
    assert seen == set("xyabcde")
    plain = open_dataset("cxr_mix", table="t.csv", root=tmp_path, balance=False)
    assert len(plain) == 7 and answer(draws(plain, 3, 1)[0]) == "no"


def test_yes_no_tables_refuse_what_cannot_be_true_or_balanced(tmp_path):
    header = ("image_path", "disease", "label")
    rows = [
        ("a.png", "Effusion", "1"),
        ("a.png", "Pleural Effusion", "0"),
        ("b.png", "Effusion", "1"),
        ("c.png", "Effusion", "0"),
        ("d.png", "Mass", "1"),
        ("e.png", "Effusion", "2"),
        ("f.png", "No Finding", "1"),
        ("g.png", "No Finding", "0.0"),
    ]
    write_csv(tmp_path / "t.csv", header, *rows)
    with pytest.raises(TableError) as error:
        open_dataset("cxr_mix", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [2, 5, 6]
    assert "row 1" in error.value.problems[0].reason and "gives the answer away" in error.value.problems[1].reason
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path, quarantine=True)
    assert {s.path for i in range(len(dataset)) for s in dataset.scans(i)} == {"b.png", "c.png", "f.png", "g.png"}
    # "No finding" is turned into a question one can ask, with its answer turned too.
    got = {draws(dataset, i, 1)[0].scans[0].path: draws(dataset, i, 1)[0] for i in range(4)}
    assert answer(got["f.png"]) == "no" and answer(got["g.png"]) == "yes"
    assert "any abnormality" in texts(got["f.png"], "instruction")[0]


@pytest.mark.parametrize("normals", [0, 8, 30, 120])
def test_open_tables_asked_both_ways_are_balanced_and_true(tmp_path, normals):
    """form="both": yes and no equally often for any share of normals, and never a "no" about a label or its kin."""
    labels = [
        "Consolidation",
        "TB, Pleural effusion",
        "Pneumothorax",
        "Lung opacity",
        "Cardiomegaly, Edema",
        "Other lesion",
        "Rib fracture",
    ]
    rows = [(f"{k}.png", labels[k % len(labels)]) for k in range(42)] + [
        (f"n{k}.png", "No finding") for k in range(normals)
    ]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    dataset = open_dataset("cxr_mix", table="t.csv", root=tmp_path, form="both")
    counts, n = Counter(), 9000 // len(dataset)
    for i in range(len(dataset)):
        for sample in draws(dataset, i, n):
            counts[answer(sample) if judged(sample) else "open"] += 1
            if answer(sample) == "no":
                question = texts(sample, "instruction")[0].lower()
                kin = {
                    "Consolidation": ("consolidation", "opacity"),
                    "TB, Pleural effusion": ("tb", "tuberculosis", "effusion", "opacity", "consolidation"),
                    "Lung opacity": ("opacity", "consolidation", "tb", "edema"),
                    "Cardiomegaly, Edema": ("cardiomegaly", "edema", "opacity"),
                    "Pneumothorax": ("pneumothorax",),
                    "Rib fracture": ("fracture",),
                    "No finding": (),
                }
                assert not [
                    w for w in kin[rows[i][1]] if w in question.replace("radiograph", "").split("?")[0].split()
                ], (rows[i], question)
    total = counts["yes"] + counts["no"]
    # 4 standard deviations of a fair coin.
    assert abs(counts["yes"] - total / 2) < 2 * total**0.5 and total > 1500, counts
    assert counts["open"] > 1500


def test_labels_of_open_tables(tmp_path):
    rows = [
        ("a", "['Mass', 'Nodule/Mass']"),
        ("b", "Mass; Edema."),
        ("c", "No finding, Mass"),
        ("d", "..."),
        ("e", "Masss"),
    ]
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *rows)
    fields = dict(
        table="t.csv", root=tmp_path, quarantine=True, vocabulary=("Mass", "Edema", "Nodule/Mass", "No finding")
    )
    dataset = open_dataset("cxr_mix", **fields)
    assert [answer(draws(dataset, i, 1)[0]) for i in range(2)] == ["Mass, Nodule/Mass.", "Mass, Edema."]
    assert [p.row for p in dataset.problems] == [3, 4, 5]
    for form, match in (("yes_no", "needs a column disease"), ("half", "unknown")):
        with pytest.raises(ValueError, match=match):
            open_dataset("cxr_mix", **fields, form=form)


def test_diseases_that_may_hide_behind_each_other():
    kin = [
        ("TB", "Tuberculosis"),
        ("Effusion", "pleural_effusion"),
        ("Fracture", "Rib fracture"),
        ("Pneumonia", "COVID-19"),
        ("Oedema", "Pulmonary edema"),
        ("Appendicitis", "Acute appendicitis"),
        ("Lung Opacity", "Atelectasis"),
    ]
    for a, b in kin:
        assert diseases.may_coexist(a, b) and diseases.may_coexist(b, a), (a, b)
    for a, b in [("Edema", "Pneumothorax"), ("Osteophytes", "Disc space narrowing"), ("Mass", "Cardiomegaly")]:
        assert not diseases.may_coexist(a, b) and not diseases.may_coexist(b, a)
    assert diseases.spoken("Pleural_Thickening") == "pleural thickening" and diseases.spoken("COPD") == "COPD"


# Modality


@pytest.mark.parametrize(
    "label, names",
    [
        ("CT", {"CT"}),
        ("CT - noncontrast", {"CT"}),
        ("MR - T2W FLAIR", {"MRI"}),
        ("PET-CT", {"PET-CT"}),
        ("Angiography (DSA)", {"angiography"}),
        ("CT angiography", {"CT angiography"}),
        ("CTA", {"CT angiography"}),
        ("XR - Plain Film", {"X-ray"}),
        ("US - Doppler", {"ultrasound"}),
        ("Magnetic Resonance Angiography", {"MR angiography"}),
        ("Mammography", {"mammography"}),
        ("An annotated banana", set()),
        ("", set()),
    ],
)
def test_modality_labels(label, names):
    assert modalities.modalities(label) == names


def test_no_modality_is_denied_that_may_hold():
    for name in modalities.WORDS:
        names = frozenset({name})
        denied = set(modalities.falsehoods(names))
        assert denied and not denied & set(modalities.truths(names))
        # Nor may anything that the asked one also is be true.
        assert not any(set(modalities.truths(frozenset({d}))) & set(modalities.truths(names)) for d in denied)
    assert "CT" in modalities.truths(frozenset({"CT angiography"}))
    assert not {"CT", "PET", "CT angiography"} & set(modalities.falsehoods(frozenset({"PET-CT"})))
    assert "X-ray" not in modalities.falsehoods(frozenset({"mammography"}))
    assert {"MRI", "ultrasound"} <= set(modalities.falsehoods(frozenset({"CT"})))


@pytest.mark.parametrize("name", ["rad3d_modality", "mpx_single"])
def test_modality_questions_are_true_and_balanced(tmp_path, name):
    labels = ["CT"] * 6 + ["MRI"] * 3 + ["PET-CT", "CT angiography", "X-ray", "Ultrasound"]
    if name == "mpx_single":
        write_csv(
            tmp_path / "t.csv",
            ("name", "type", "context"),
            *[(f"{k}.png", "modality", m) for k, m in enumerate(labels)],
        )
    else:
        write_csv(tmp_path / "t.csv", ("image_path", "answer"), *[(f"{k}.nii.gz", m) for k, m in enumerate(labels)])
    dataset = open_dataset(name, table="t.csv", root=tmp_path, fraction=0.2)
    assert dataset.fraction == 0.2
    counts, asked = Counter(), {"yes": Counter(), "no": Counter()}
    for i, label in enumerate(labels):
        truths = modalities.truths(modalities.modalities(label))
        for sample in draws(dataset, i, 600):
            assert sample.task == "modality"
            said = answer(sample)
            counts[said if judged(sample) else "open"] += 1
            if not judged(sample):
                assert said == label
                continue
            question = texts(sample, "instruction")[0]
            about = max((m for m in modalities.WORDS if m in question), key=len)
            asked[said][about] += 1
            assert (about in truths) == (said == "yes"), (label, question)
            assert said == "yes" or about in modalities.falsehoods(modalities.modalities(label))
    total = counts["yes"] + counts["no"]
    assert abs(counts["yes"] - total / 2) < 2 * total**0.5 and abs(total - 7800 / 2) < 2 * 7800**0.5
    # Wrong modalities follow the table too: a common one is denied more often than one it does not hold.
    assert asked["no"]["MRI"] > 2 * asked["no"]["endoscopy"] > 0


def test_unknown_modalities_and_types_are_errors(tmp_path):
    rows = [("a", "modality", "banana"), ("b", "Plane", "axial"), ("c", "smell", "x"), ("d", "Image caption", "A CT.")]
    write_csv(tmp_path / "t.csv", ("name", "type", "context"), *rows)
    with pytest.raises(TableError) as error:
        open_dataset("mpx_single", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [1, 3, 4] and "`modalities`" in str(error.value)
    own = dict(modalities={"banana": "MRI"}, types={"Image caption": "caption", "smell": "caption"})
    dataset = open_dataset("mpx_single", table="t.csv", root=tmp_path, images="pictures", **own)
    assert [draws(dataset, i, 1)[0].task for i in range(4)] == ["modality", "vqa", "report", "report"]
    assert dataset.scans(1) == (Scan("pictures/b"),)


# MPx-Multi


def test_mpx_multi_shows_what_it_chose(tmp_path):
    """Ten of twelve images, in their order: exactly those stand in the sample, and over epochs all are reached."""
    names = [f"MPX1_{k}.png" for k in range(12)]
    rows = [
        (",".join(names), kind, f"The {kind}.", "A man of 50.")
        for kind in ("txFollowup", "ddx", "dxHow", "diagnosis", "findings", "exam", "discussion")
    ]
    write_csv(tmp_path / "t.csv", ("name", "type", "context", "history"), *rows)
    dataset = open_dataset("mpx_multi", table="t.csv", root=tmp_path)
    assert len(dataset.scans(0)) == 12
    seen = set()
    for sample in draws(dataset, 0):
        paths = [s.path for s in sample.scans]
        assert len(paths) == 10 and paths == sorted(paths, key=names.index)
        seen |= set(paths)
        assert (
            texts(sample, "context") == ["A man of 50."]
            and sample.study_id == "MPX1"
            and answer(sample) == "The txFollowup."
        )
    assert seen == set(names)
    assert len({texts(draws(dataset, i, 1)[0], "instruction")[0] for i in range(7)}) == 7
    write_csv(
        tmp_path / "t.csv",
        ("name", "type", "context", "history"),
        ("a.png,,b.png", "ddx", "x", ""),
        ("a.png", "DDX?", "x", ""),
    )
    with pytest.raises(TableError) as error:
        open_dataset("mpx_multi", table="t.csv", root=tmp_path)
    assert [p.row for p in error.value.problems] == [1, 2]


def test_mpx_questions_join_the_explanation(every):
    assert answer(draws(open_dataset("mpx_questions", **every["mpx_questions"]), n=1)[0]) == "B. Because."


# Rad3D


def test_caption_joins_patient_findings_and_impression(tmp_path):
    cases = [CASE, {**CASE, "pre": None, "pat": "None", "finding": None}, {**CASE, "finding": "", "impression": None}]
    volumes(tmp_path, "v/1.npy", 1)
    write_json(tmp_path / "c.json", cases)
    dataset = open_dataset("rad3d_caption", table="c.json", root=tmp_path, quarantine=True)
    assert [p.row for p in dataset.problems] == [3] and dataset.scans(0) == (Scan("v/1.npy"),)
    first, second = draws(dataset, 0, 1)[0], draws(dataset, 1, 1)[0]
    assert (
        texts(first, "context") == ["Age: 40 years Gender: Male. Sudden chest pain."] and texts(second, "context") == []
    )
    assert answer(first) == "Findings: A 3 x 2.5 cm mass. No effusion. Impression: Lung abscess."
    assert answer(second) == "Impression: Lung abscess."
    write_json(tmp_path / "c.json", [*cases[:2], {**CASE, "finding": "It measures 3 cm.", "impression": ""}])
    dataset = open_dataset("rad3d_caption", table="c.json", root=tmp_path, sizes="remove")
    assert answer(draws(dataset, 0, 1)[0]) == "Findings: A mass. No effusion. Impression: Lung abscess."
    assert dataset.left_out == {"nothing but sizes": 1}


def test_rationale_is_half_questions_half_of_them_no_and_true(tmp_path):
    """Case 0 has an abscess, an article on cavities, and speaks of a pneumothorax: none of these is ever denied."""
    volumes(tmp_path, "v/1.npy", 1)
    titles = ["Lung abscess", "Pneumothorax", "Abscess", "Crohn disease", "Glioma", "Meningioma"]
    cases = [{**CASE, "title": t, "articles": [t], "finding": "-", "impression": "-"} for t in titles]
    cases[0] |= {"articles": ["Lung abscess", "Pulmonary cavity"], "finding": "There is also a pneumothorax."}
    cases[3]["articles"] = ["Crohn disease", "Ileus", "A text about Crohn disease and the like. " * 9]
    write_json(tmp_path / "c.json", cases)
    dataset = open_dataset("rad3d_rationale", table="c.json", root=tmp_path)
    samples = draws(dataset, 0, 4000)
    kinds = Counter(answer(s) if judged(s) else "open" for s in samples)
    # 4 standard deviations: 126 of 4000 halved, 110 of 4000 quartered.
    assert abs(kinds["open"] - 2000) < 127 and abs(kinds["yes"] - 1000) < 110 and abs(kinds["no"] - 1000) < 110
    denied = {texts(s, "instruction")[0] for s in samples if answer(s) == "no"}
    assert all(any(t in q for q in denied) for t in ("Crohn disease", "Glioma", "Meningioma", "Ileus"))
    assert not [q for q in denied if any(w in q for w in ("bscess", "neumothorax", "cavity", "text"))]
    assert all("Lung abscess" in texts(s, "instruction")[0] for s in samples if answer(s) == "yes")
    assert {s.task for s in samples if judged(s)} == {"diagnosis"} and {s.task for s in samples if not judged(s)} == {
        "rationale"
    }
    opened = next(s for s in samples if not judged(s))
    assert answer(opened) == "Lung abscess. CT: cavity with a level. X-ray: same."
    write_json(tmp_path / "one.json", cases[:1])
    alone = draws(open_dataset("rad3d_rationale", table="one.json", root=tmp_path))
    assert not [s for s in alone if judged(s)]  # nothing to deny: no question that is always answered yes
    cases[4]["title"] = "Normal"
    write_json(tmp_path / "c.json", cases)
    dataset = open_dataset("rad3d_rationale", table="c.json", root=tmp_path)
    assert not [s for s in draws(dataset, 4) if judged(s)]
    assert not [s for s in draws(dataset, 5, 500) if judged(s) and "ormal" in texts(s, "instruction")[0]]


# The user's own data


def own(tmp_path, *objects):
    file = tmp_path / "own.jsonl"
    file.write_text("".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects), encoding="utf-8")
    return dict(table=file, root=tmp_path)


def test_jsonl_keeps_the_order_of_marks(tmp_path):
    fields = own(
        tmp_path,
        {
            "id": "case-17",
            "task": "report",
            "scans": ["ct.nii.gz", {"path": "old.png", "window": [-160, 240]}],
            "context": "Was <image-2>.",
            "instruction": "<image-1> Compare with <image-2> . What are the findings?",
            "response": "Better.",
            "study": "S1",
        },
        {
            "id": "paper-3",
            "task": "interleaved",
            "scans": [{"path": "f.nii", "volume": 1, "window": "lung"}],
            "text": "... in <image-1> ...",
        },
        {"id": "plain", "task": "vqa", "scans": [], "instruction": "What is <image12>?", "response": "Text."},
    )
    dataset = open_dataset("jsonl", **fields)
    ct, old = Scan("ct.nii.gz"), Scan("old.png", None, (-160.0, 240.0))
    sample = dataset.sample(0, np.random.default_rng(0))
    assert (sample.row_id, sample.task, sample.study_id) == ("case-17", "report", "S1")
    assert sample.parts == (
        Text("Was", "context"),
        old,
        Text(".", "context"),
        ct,
        Text("Compare with", "instruction"),
        old,
        Text(". What are the findings?", "instruction"),
        Text("Better.", "response"),
    )
    assert dataset.scans(0) == (old, ct)
    paper = dataset.sample(1, np.random.default_rng(0))
    assert paper.parts == (Text("... in", "interleaved"), Scan("f.nii", 1, "lung"), Text("...", "interleaved"))
    assert dataset.sample(2, np.random.default_rng(0)).parts[0] == Text("What is <image12>?", "instruction")


GOOD = {"id": "a", "task": "vqa", "scans": ["a.png"], "instruction": "<image-1> Q?", "response": "A."}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"respnse": "x"}, "unknown keys: 'respnse'"),
        ({"id": 3}, "id must be text"),
        ({"id": ""}, "id is blank"),
        ({"task": "vqua"}, "task 'vqua' is unknown"),
        ({"task": None}, "task is blank"),
        ({"scans": "a.png"}, "scans must be a list"),
        ({"scans": [3]}, "neither a path"),
        ({"scans": [{"path": "a", "wndow": "lung"}]}, "neither a path"),
        ({"scans": None}, "scans must"),
        ({"scans": [{"path": "a", "volume": True}]}, "volume True"),
        ({"scans": [{"path": "a", "volume": -1}]}, "volume -1"),
        ({"scans": [{"path": "a", "window": [2, 1]}]}, "window"),
        ({"scans": [{"path": "a", "window": 3}]}, "window 3"),
        ({"scans": ["../a.png"]}, "climbs"),
        ({"scans": [""]}, "names no file"),
        ({"scans": ["a", "b"]}, "no mark <image-2>"),
        ({"instruction": "<image-2> Q?"}, "no scan for <image-2>"),
        ({"instruction": "Q?"}, "no mark <image-1>"),
        ({"instruction": "<image-1>"}, "marks but no words"),
        ({"instruction": " "}, "instruction is blank"),
        ({"response": "nan"}, "response is blank"),
        ({"response": "see <image-1>"}, "response shows a scan"),
        ({"response": None}, "response is needed"),
        ({"text": "x"}, "text is not allowed"),
        ({"task": "interleaved"}, "text is needed"),
        ({"response": ["A"]}, "response must be text, got list"),
        ({"context": ""}, "context is blank"),
        ({"response": "\x00"}, "NUL"),
        ({"response": "\ud800"}, "UTF-8"),
        ({"instruction": "<image-99999> <image-1> q"}, "no scan for <image-99999>"),
    ],
)
def test_jsonl_refuses(tmp_path, change, message):
    open_dataset("jsonl", **own(tmp_path, GOOD))
    with pytest.raises(RowError) as error:
        open_dataset("jsonl", **own(tmp_path, {**GOOD, "id": "first"}, {**GOOD, **change}))
    assert error.value.row == 2 and message in str(error.value)


def test_jsonl_lines_and_ids(tmp_path):
    nan = json.dumps(GOOD).replace('"A."', "NaN")
    twice = json.dumps(GOOD)[:-1] + ', "id": "b"}'
    fields = own(tmp_path, GOOD, "{", "", "[]", nan, twice, GOOD, "[" * 100000, {**GOOD, "id": "z"})
    with pytest.raises(TableError) as error:
        open_dataset("jsonl", **fields)
    assert [p.row for p in error.value.problems] == [2, 3, 4, 5, 6, 7, 8]
    for problem, reason in zip(
        error.value.problems, ("JSON", "blank", "object", "NaN", "twice", "row 1", "JSON"), strict=True
    ):
        assert reason in problem.reason
    dataset = open_dataset("jsonl", **fields, quarantine=True)
    assert [dataset.row_id(i) for i in range(len(dataset))] == ["a", "z"]


# TFDS


def test_tfds_source(tmp_path):
    import textwrap

    (tmp_path / "own_vqa_builder.py").write_text(
        textwrap.dedent('''
        import tensorflow_datasets as tfds

        class OwnVqa(tfds.core.GeneratorBasedBuilder):
            """A small set."""
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                text = tfds.features.Text()
                features = {"question": text, "answer": text, "scans": tfds.features.Sequence(text), "blob": text}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for k in range(6):
                    texts = {"question": "<image-1> Q?", "answer": "" if k == 5 else f"A{k}"}
                    yield k, {**texts, "scans": [f"s{k}.png"], "blob": b"\\xff\\x00"}
        ''')
    )
    import importlib
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        module = importlib.import_module("own_vqa_builder")
        builder = module.OwnVqa(data_dir=tmp_path / "data", file_format="array_record")
        builder.download_and_prepare()
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["own_vqa_builder"]
    columns = {"instruction": "question", "response": "answer"}
    fields = dict(table=builder.data_path, root=tmp_path, columns=columns, constants={"task": "vqa"})
    with pytest.raises(TableError, match="response is needed"):
        open_dataset("tfds", **fields, split="train")
    dataset = open_dataset("tfds", **fields, split="train", quarantine=True)
    assert len(dataset) == 5 and len(dataset.problems) == 1
    got = {dataset.sample(i, np.random.default_rng(0)) for i in range(5)}
    assert {answer(s) for s in got} == {f"A{k}" for k in range(5)}
    assert all(s.scans == (Scan(f"s{answer(s)[1:]}.png"),) and s.task == "vqa" and s.dataset == "tfds" for s in got)
    with pytest.raises(ValueError, match="split is needed"):
        open_dataset("tfds", **fields)
    with pytest.raises(RowError, match="cannot be opened"):
        open_dataset("tfds", **fields, split="tarin")
    with pytest.raises(RowError, match="features nope are missing"):
        open_dataset("tfds", **{**fields, "columns": {"response": "nope"}}, split="train")
    with pytest.raises(RowError, match="dataset_info.json is missing"):
        open_dataset("tfds", table="data", root=tmp_path, split="train")


# Speed


def test_vqa_samples_are_fast(tmp_path):
    """CPU time, best of five: 250,000/s measured on a core with other jobs beside it."""
    write_csv(tmp_path / "t.csv", VQA_HEADER, *[("img", f"{k}.png", f"Question {k}?", "yes") for k in range(2000)])
    dataset = open_dataset("pmc_vqa", table="t.csv", root=tmp_path)
    rng, best = np.random.default_rng(0), 0.0
    for _ in range(5):
        start = time.process_time()
        for i in range(2000):
            dataset.sample(i, rng)
        best = max(best, 2000 / (time.process_time() - start))
    assert best > 20_000, f"{best:.0f} samples/s"

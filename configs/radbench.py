"""RadBench: the five tasks and thirteen data sets of the paper (section 5, Table 3), as docs/evaluation.md says.

    python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores
    python -m radfm_jax.evaluate radbench --config=configs/radbench.py:/data --export=for_others

reads data/NAME/test.csv and the like (`:ROOT` for another root than data); --config.sets.vqa_rad.table=... for another
table, --config.sets.vqa_rad.strip=... for paths that begin with their authors' folder. What is not there is named in
the report. The tables' layouts: docs/data_layouts.md. Splits: official ones for VinDr, CXR-Mix, PMC-VQA, VQA-RAD and
SLAKE; the random ones of PMC-CaseReport, MIMIC-CXR and Rad3D are the authors' own, as far as they published them.

Not run: the sets need agreements that whoever runs it has to sign. The paper counts 310,375 test cases.
"""

from ml_collections import ConfigDict

from radfm_jax.evaluate.radbench import Benchmark

DIAGNOSIS = ("vindr_mammo", "vindr_spinexr", "vindr_pcxr", "cxr_mix")
VQA = ("pmc_vqa", "pmc_casereport", "vqa_rad", "slake", "rad3d_vqa")


def sets(root: str) -> dict[str, dict]:
    def one(name: str, table: str = "test.csv", **fields) -> dict:
        return {"family": name, "root": f"{root}/{name}", "table": table, "strip": "", "limit": 0, **fields}

    return {
        "rad3d_modality": one("rad3d_modality", judgement=0.0),  # 5.2: asked openly, matched to a list
        # 5.2: as many questions answered yes as no.
        **{name: one(name, "test_yes_no.csv", form="yes_no", balance=True) for name in DIAGNOSIS},
        **{name: one(name) for name in VQA},
        "mimic_cxr": one("mimic_cxr"),
        "rad3d_caption": one("rad3d_caption", "test.json", sizes="remove"),  # as in RadMD, Table 2
        "rad3d_rationale": one("rad3d_rationale", "test.json", judgement=0.0),
    }


def get_config(root: str = "data") -> ConfigDict:
    return ConfigDict(Benchmark(sets=sets(root)).to_dict(), convert_dict=True).lock()

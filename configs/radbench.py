"""RadBench: the five tasks and thirteen data sets of the paper (section 5, Table 3); protocol in docs/evaluate.md.

    python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores
    python -m radfm_jax.evaluate radbench --config=configs/radbench.py:/data --export=for_others

Reads data/NAME/test.csv and similar files; `:ROOT` replaces `data`. --config.sets.vqa_rad.table=... selects another
table, --config.sets.vqa_rad.strip=... removes a prefix of its scan paths. The report lists missing data sets.
Table layouts: docs/data_layouts.md. Splits: official for VinDr, CXR-Mix, PMC-VQA, VQA-RAD and SLAKE; the authors'
random splits, where published, for PMC-CaseReport, MIMIC-CXR and Rad3D.

Not run yet: the data sets require data use agreements. The paper counts 310,375 test cases.
"""

from ml_collections import ConfigDict

from configs.radfm_14b import terms
from radfm_jax.evaluate.radbench import Benchmark

DIAGNOSIS = ("vindr_mammo", "vindr_spinexr", "vindr_pcxr", "cxr_mix")
VQA = ("pmc_vqa", "pmc_casereport", "vqa_rad", "slake", "rad3d_vqa")


def sets(root: str) -> dict[str, dict]:
    def data_set(name: str, table: str = "test.csv", **fields) -> dict:
        return {"family": name, "root": f"{root}/{name}", "table": table, "strip": "", "limit": 0, **fields}

    return {
        "rad3d_modality": data_set("rad3d_modality", judgement=0.0),  # 5.2: open questions, matched to a list
        # 5.2: equal numbers of yes and no.
        **{name: data_set(name, "test_yes_no.csv", form="yes_no", balance=True) for name in DIAGNOSIS},
        **{name: data_set(name) for name in VQA},
        "mimic_cxr": data_set("mimic_cxr"),
        "rad3d_caption": data_set("rad3d_caption", "test.json", sizes="remove"),  # as in RadMD, Table 2
        "rad3d_rationale": data_set("rad3d_rationale", "test.json", judgement=0.0),
    }


def get_config(root: str = "data") -> ConfigDict:
    return ConfigDict(Benchmark(sets=sets(root), terms=terms(root)).to_dict(), convert_dict=True).lock()

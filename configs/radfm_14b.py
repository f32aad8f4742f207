"""The released RadFM and the settings that all stages share. This config is not trained itself.

LLaMA-13B, a 12-layer 3D vision transformer and a 6-layer perceiver: 13,123,822,336 parameters. The data is MedMD. As in
the paper (4.3): 2,048 tokens per row, 4 micro-batches per step, FSDP over all devices, bfloat16 compute with float32
weights, remat.

Each stage starts from the one before:

    configs/pretrain_align.py     epoch 1: MedMD, the language model frozen
    configs/pretrain.py           epochs 2 to 4: MedMD, all parameters learn
    configs/finetune.py           2 epochs: RadMD
    configs/adapt*.py             the user's own data or a public benchmark, from the released weights

docs/configs.md lists the tables and scans expected below `data/`. `--config=configs/pretrain.py:/mnt/medmd` uses
/mnt/medmd instead, in every command and every config except quickstart and tiny. The medical terms are those of UMLS if
data/umls has MRCONSO.RRF (and MRSTY.RRF), else the open terms. `prepare` and `train` print which terms they use.

This config also has the sizes for a `pytorch_model.bin` without a config.json:

    python -m radfm_jax.convert from-torch pytorch_model.bin radfm/ --config configs/radfm_14b.py
"""

from pathlib import Path

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.cost.estimate import Source
from radfm_jax.models import radfm
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig

# Rows as counted by the paper (Table 1; PMC-Inline: windows with 2.5 of its 11 million figures). Tokens and patches per
# sample are guesses for estimates: a 2D scan is 34 tokens and 256 patches, a volume of 32 slices 34 and 512, a case of
# Rad3D 2.5 volumes.
SIZES = {
    "pmc_inline": Source(4_400_000, 1600, 640),  # 50 sentences of 30 tokens, 2.5 figures
    "pmc_oa": Source(1_650_000, 170, 256),
    "pmc_casereport": Source(1_100_000, 260, 384),
    "pmc_vqa": Source(413_000, 75, 256),
    "mpx_single": Source(114_000, 80, 256),
    "mpx_multi": Source(39_000, 420, 1280),
    "vqa_rad": Source(3_500, 70, 256),
    "slake": Source(6_000, 70, 256),
    "mimic_cxr": Source(227_000, 190, 400),
    "cxr_mix": Source(449_000, 60, 256),
    "cxr_mix_yes_no": Source(449_000, 60, 256),
    "vindr_pcxr": Source(9_000, 60, 256),
    "vindr_mammo": Source(20_000, 60, 256),
    "vindr_spinexr": Source(10_000, 60, 256),
    "rad3d_caption": Source(73_000, 340, 1280),
    "rad3d_vqa": Source(205_000, 140, 1280),
    "rad3d_modality": Source(264_000, 60, 512),
    "rad3d_rationale": Source(73_000, 260, 1280),
}
VINDR = ("vindr_pcxr", "vindr_mammo", "vindr_spinexr")


def source(root: str, folder: str, table: str, **fields) -> dict:
    """Return a source in `root`/`folder`; the folder is also the family's name.

    All fields are present, so that all can be overridden: `strip` for published tables with absolute paths.
    """
    return {"family": folder, "table": table, "root": f"{root}/{folder}", "strip": "", "fraction": 1.0, **fields}


def medmd(root: str) -> dict[str, dict]:
    """Return all data of the paper's Table 1.

    An epoch has every row and every figure. `--config.data.epoch=released` is the epoch of the released code.
    """
    plain = (
        "pmc_inline", "pmc_oa", "pmc_casereport", "pmc_vqa", "vqa_rad", "slake", "mimic_cxr", "mpx_single", "mpx_multi",
        "rad3d_vqa", "rad3d_modality",
    )  # fmt: skip
    return {
        **{name: source(root, name, "train.csv") for name in plain},
        "cxr_mix": source(root, "cxr_mix", "train.csv", balance=False),
        "rad3d_caption": source(root, "rad3d_caption", "train.json", sizes="keep"),
        "rad3d_rationale": source(root, "rad3d_rationale", "train.json"),
        "cxr_mix_yes_no": source(root, "cxr_mix", "train_yes_no.csv"),
        # Readers looked for every label in every image, so an absent label is a true "no".
        **{name: source(root, name, "train.csv", form="both", balance=False) for name in VINDR},
    }


def tests(root: str) -> dict[str, dict]:
    """Return the data sets of Table 3, which only `radfm_jax.evaluate` reads.

    A share of each table suffices for exact match: some thousand samples in all, a few batches.
    """
    share = {
        "pmc_casereport": 0.01, "pmc_vqa": 0.02, "vqa_rad": 1.0, "slake": 1.0, "rad3d_vqa": 0.02, "mimic_cxr": 0.1,
        "rad3d_modality": 0.05,
    }  # fmt: skip
    diagnosis = {"cxr_mix": 0.01, **dict.fromkeys(VINDR, 0.1)}
    fields = {"form": "yes_no", "balance": False}
    return {
        **{f"{name}_test": source(root, name, "test.csv", fraction=f) for name, f in share.items()},
        **{
            f"{name}_test": source(root, name, "test_yes_no.csv", fraction=f, **fields) for name, f in diagnosis.items()
        },
        "rad3d_caption_test": source(root, "rad3d_caption", "test.json", fraction=0.1, sizes="keep"),
        "rad3d_rationale_test": source(root, "rad3d_rationale", "test.json", fraction=0.5),
    }


def terms(root: str) -> str:
    """Return the source of medical terms: UMLS, as in the paper, if it is in `root`/umls, else the open terms."""
    return f"umls:{root}/umls" if Path(root, "umls", "MRCONSO.RRF").is_file() else "open"


def get_config(root: str = "data") -> ConfigDict:
    experiment = Experiment(
        radfm.radfm_14b(),
        DataConfig(
            train=medmd(root),
            # The same studies in all stages, with about 15,000 samples: two minutes per evaluation.
            validation_share=0.002,
            test=tests(root),
            index=f"{root}/medmd_index",
            tokenizer="medllama/tokenizer.model",
            terms=terms(root),
            workers=16,
        ),
        # Paper: 4 micro-batches of 1 volume or 4 images on each of 32 devices: 128 to 512 samples per step.
        # Here: one row of 2,048 tokens for each, so 128 rows per step, about 300 samples of MedMD.
        TrainConfig(batch=4 * 32, accumulation=4, dtype="bfloat16", remat="full", chunk=256, eval_every=1000),
        # The paper reports no learning rates. Here the language model's rate is a fifth of the new modules' rate.
        OptimizerConfig(learning_rate=1e-4, warmup_steps=500, rates={"llama": 0.2}),
        checkpoint=CheckpointConfig(save_every=500),
    )
    return ConfigDict(experiment.to_dict(), convert_dict=True).lock()

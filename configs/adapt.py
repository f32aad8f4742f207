"""A user's own data, one JSON object a line (docs/data_layouts.md), at the sizes of the released model.

    python -m input_pipeline.prepare --config=configs/adapt.py --out my/index \
        --config.data.train.own.root=my --config.data.test.own_test.root=my --config.data.tokenizer=tokenizer.model

`tokenizer.model` is the SentencePiece model of the language model (LLaMA's stands beside its weights). This
reads my/train.jsonl and my/test.jsonl, and scans by paths relative to my/. For tables of another family, copy this file
and change `family` and `table`.
"""

from ml_collections import ConfigDict

from input_pipeline.config import DataConfig
from radfm_jax.models import radfm


def data() -> DataConfig:
    own = lambda table: {"family": "jsonl", "table": table, "root": "my"}  # noqa: E731
    return DataConfig(
        train={"own": own("train.jsonl")},
        test={"own_test": own("test.jsonl")},
        index="my/index",
        tokenizer="tokenizer.model",
    )


def get_config() -> ConfigDict:
    config = ConfigDict({"model": radfm.radfm_14b().to_dict(), "data": data().to_dict()}, convert_dict=True)
    return config.lock()

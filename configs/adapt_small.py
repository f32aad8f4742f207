"""Adapt a small model, such as that of the quickstart, to the user's own data on a laptop or one GPU.

All parameters learn. The model, the tokenizer, the preparation of scans and the sizes of a row are those of
`checkpoint.init_from`, unless an option sets them.

    bash launch/quickstart.sh
    python -m input_pipeline.prepare --config=configs/adapt_small.py --out my/index
    python -m radfm_jax.train --config=configs/adapt_small.py --workdir=runs/adapt_small
    python -m radfm_jax.evaluate --checkpoint=runs/adapt_small --config=configs/adapt_small.py --out=scores

Data: as in configs/adapt.py, my/train.jsonl and my/test.jsonl; `--config=configs/adapt_small.py:DIR` reads DIR instead.

Hardware: two CPU cores and 2 GB of memory for the model of the quickstart.
"""

from ml_collections import ConfigDict

from configs import adapt
from radfm_jax.training import variants

resolve = adapt.resolve


@variants.with_variants
def get_config(root: str = "my") -> ConfigDict:
    config = adapt.get_config(root).unlock()
    config.checkpoint.init_from = "runs/quickstart/finetune"
    config.optimizer.update(frozen=(), learning_rate=3e-4, warmup_steps=10)
    config.train.update(dtype="float32", accumulation=1, epochs=10.0, eval_every=50, log_every=10)
    config.data.workers = 2
    return config.lock()

"""The quickstart data with the smallest RadFM that has every part (about 400,000 parameters): an installation test.

    python -m input_pipeline.phantoms --out practice
    python -m input_pipeline.prepare --config=configs/quickstart.py --out practice/index
    python -m radfm_jax.train --config=configs/tiny.py --workdir=runs/tiny

Twenty steps on a laptop. The model learns nothing useful.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import quickstart
from radfm_jax.models import radfm


def get_config() -> ConfigDict:
    config = quickstart.get_config().unlock()
    sizes = radfm.tiny()
    llama = dataclasses.replace(sizes.llama, vocab_size=config.model.llama.vocab_size)
    config.model = ConfigDict(dataclasses.replace(sizes, llama=llama).to_dict(), convert_dict=True)
    config.data.num_latents = sizes.num_latents
    config.train.update(steps=20, batch=8, log_every=5, eval_every=0, eval_batches=2)
    config.optimizer.warmup_steps = 5
    config.checkpoint.save_every = 10
    return config.lock()

"""The released RadFM: LLaMA-13B, a 12-layer 3D vision transformer, a 6-layer perceiver; 13,123,822,336 parameters.

Hardware: 26 GB of parameters in bfloat16, so one 80 GB accelerator for logits, or several small ones on a mesh.
Sizes of a `pytorch_model.bin` without a config.json beside it:

    python -m radfm_jax.convert from-torch pytorch_model.bin radfm/ --config configs/radfm_14b.py
"""

from ml_collections import ConfigDict

from radfm_jax.models import radfm


def get_config() -> ConfigDict:
    config = ConfigDict({"model": radfm.radfm_14b().to_dict()}, convert_dict=True)
    return config.lock()

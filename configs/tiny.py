"""The smallest RadFM that has every part: about 50,000 parameters, for tests and for trying commands on a laptop."""

from ml_collections import ConfigDict

from radfm_jax.models import radfm


def get_config() -> ConfigDict:
    config = ConfigDict({"model": radfm.tiny().to_dict()}, convert_dict=True)
    return config.lock()

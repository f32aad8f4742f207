"""Reads and writes the weight files of the PyTorch world in the memory of one tensor.

Reading: torch's zip format (`.bin`, `.pt`, `.pth`), the zip around `pytorch_model.bin` in which RadFM's weights are
published, safetensors, and Hugging Face's sharded folders of either. Writing: torch's zip format and safetensors.

Nothing read here is trusted: a pickle goes through torch's restricted loader or not at all, names inside archives are
never used as paths, and every size is checked against the file before memory or disk is taken.

torch is imported only for its own format, so safetensors need no torch.
"""

from radfm_jax.convert.tensor_files.base import TensorInfo, TensorReader
from radfm_jax.convert.tensor_files.opening import open_tensors
from radfm_jax.convert.tensor_files.safetensors_format import write_safetensors
from radfm_jax.convert.tensor_files.torch_format import write_torch_bin

__all__ = ["TensorInfo", "TensorReader", "open_tensors", "write_safetensors", "write_torch_bin"]

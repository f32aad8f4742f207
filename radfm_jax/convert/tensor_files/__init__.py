"""Readers and writers of PyTorch weight files that keep one tensor in memory at a time.

Reads torch's zip format (`.bin`, `.pt`, `.pth`), the published zip around `pytorch_model.bin`, safetensors, and Hugging
Face's sharded folders of either. Writes torch's zip format and safetensors. Only torch's own format needs torch.

No input is trusted: pickles go only through torch's restricted loader, names inside archives are never used as paths,
and every size is checked against the file before memory or disk is allocated. Which tensor is which parameter belongs
to `convert/table.py`.
"""

from radfm_jax.convert.tensor_files.base import TensorInfo, TensorReader
from radfm_jax.convert.tensor_files.opening import open_tensors
from radfm_jax.convert.tensor_files.safetensors_format import write_safetensors
from radfm_jax.convert.tensor_files.torch_format import write_torch_bin

__all__ = ["TensorInfo", "TensorReader", "open_tensors", "write_safetensors", "write_torch_bin"]

"""A program that runs an exported folder in transformers: `python child.py FOLDER INPUTS LOGITS DTYPE`.

It runs in a process of its own, without JAX. INPUTS is an .npz with the arguments of the model's forward pass; LOGITS
is written as .npy, float32[B, T, V + 3].
"""

import sys

import numpy as np


def main(folder: str, inputs: str, logits: str, dtype: str) -> None:
    """Write the logits of the model for the inputs."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype)).eval()
    arguments = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
    with torch.no_grad():
        np.save(logits, model(**arguments).logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A process without JAX that calls the processors of exports: `python processor_child.py CALLS.json`.

The file has a list of calls: {"folder", "method", "arguments"}; the method `answer` is the function below. It prints a
list with the result of each: a text, a list, the message of an error, or the inputs of a model as JSON, with
pixel_values as the `digest` of the array.
"""

import no_jax  # noqa: F401, I001 (first, so that later imports are blocked)

import functools
import hashlib
import json
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

logging.set_verbosity_error()


@functools.cache
def processor(folder: str):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def answer(folder: str, **arguments) -> list[int]:
    """Return the tokens of a greedy answer, with the one that ends it."""
    inputs = processor(folder)(**arguments)
    tokens = model(folder).generate(**inputs, max_new_tokens=60, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


@functools.cache
def model(folder: str):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


def opened(value):
    """Replace {"pil": path} and {"npy": path} in arguments by an image or an array."""
    if isinstance(value, list):
        return [opened(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "pil" in value:
        return Image.open(value["pil"])
    return np.load(value["npy"]) if "npy" in value else {key: opened(item) for key, item in value.items()}


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array with its type and shape."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def run(call: dict):
    try:
        with warnings.catch_warnings(action="error"):
            if call["method"] == "answer":
                return answer(call["folder"], **call["arguments"])
            result = getattr(processor(call["folder"]), call["method"])(**opened(call["arguments"]))
    except Exception as error:
        known = isinstance(error, ValueError)
        return f"{type(error).__name__}: {error}" + ("" if known else traceback.format_exc())
    if isinstance(result, (str, list)) or result is None:
        return result
    arrays = {name: np.asarray(value) for name, value in result.items()}
    return {name: digest(x) if name == "pixel_values" else x.tolist() for name, x in arrays.items()}


if __name__ == "__main__":
    print(json.dumps([run(call) for call in json.loads(Path(sys.argv[1]).read_text())]))

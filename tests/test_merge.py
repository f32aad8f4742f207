"""Runs with adapters -> one checkpoint: every weight, the logits, and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from convert_parts import PEAK

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.check import compare
from radfm_jax.convert.merge import merge
from radfm_jax.convert.peft.reading import from_peft
from radfm_jax.convert.peft.writing import to_peft
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.inference import stored
from radfm_jax.inference.inputs import Preparation
from radfm_jax.models import lora, quantised, radfm

LORA = lora.LoraConfig(rank=2, alpha=3.0, targets=("llama/blocks/*", "vit/blocks/qkv", "projection"))
LEARNED = ("vit/", "perceiver/", "projection/", "image_marks", "llama/norm/scale")
PREPARATION = stored.to_record(Preparation(size_2d=64, num_latents=4))


def random_params(config: radfm.RadFMConfig, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: radfm.init_params(config, jax.random.key(0)))
    return {path: rng.normal(0, 0.2, x.shape).astype(np.float32) for path, x in checkpoint.flatten(shapes).items()}


def write(directory, params: dict, model: dict, **fields) -> None:
    with checkpoint.new_directory(directory) as partial:
        checkpoint.save_params(partial, checkpoint.unflatten(params))
        checkpoint.write_description(partial, "radfm", model, **fields)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with `base` and a run for every type of base, and the parameters that a run computes with."""
    root = tmp_path_factory.mktemp("merge")
    config = dataclasses.replace(radfm.tiny(), lora=LORA)
    params = random_params(config, 0)
    base = {path: x for path, x in params.items() if not lora.is_adapter(path)}
    write(root / "base", base, radfm.tiny().to_dict(), source={"file": "x"})
    params |= {path: x + 1 for path, x in params.items() if path.startswith(LEARNED)}
    own = {path: x for path, x in params.items() if lora.is_adapter(path) or path.startswith(LEARNED)}
    record = {"directory": str(root / "base"), "sha256": checkpoint.digest(root / "base")}
    source = {"training": "adapt", "step": 3, "origin": {"training": "adapt", "step": 3, "init_from": "base"}}
    for held in quantised.BASES:
        model = dataclasses.replace(config, base=held).to_dict()
        write(root / held, own, model, source=source, base=record, preparation=PREPARATION)
    return root, params


def expected(params: dict, held: str) -> dict[str, np.ndarray]:
    """Return the merged weights, written plainly."""
    merged = {}
    for path, x in params.items():
        if lora.is_adapter(path):
            continue
        if path.startswith("llama/") and held != "float32" and path not in LEARNED:
            inputs = 2 if path == "llama/blocks/out/kernel" else 1
            if held in ("int8", "nf4") and path.startswith("llama/blocks/") and path.endswith("/kernel"):
                convert = quantised.to_int8 if held == "int8" else quantised.to_nf4
                x = np.stack([quantised.dequantise(path, *convert(layer, inputs)) for layer in x])
            elif (held, path) == ("int8", "llama/head"):
                x = quantised.dequantise(path, *quantised.to_int8(x, 1))
            else:
                x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        a, b = (params.get(path.removesuffix("/kernel") + leaf) for leaf in ("/lora_a", "/lora_b"))
        if a is not None:
            many = x.ndim == a.ndim + b.ndim - 3  # a stack of layers
            pairs = zip(a, b, strict=True) if many else [(a, b)]
            change = [1.5 * np.tensordot(a, b, 1) for a, b in pairs]
            x = x + (np.stack(change) if many else change[0])
        merged[path] = x
    return merged


@pytest.mark.parametrize("held", quantised.BASES)
def test_merged_weights_are_those_that_the_run_computes_with(held, runs, tmp_path):
    root, params = runs
    report = merge(root / held, tmp_path / "merged")
    merged, want = checkpoint.StoredParams(tmp_path / "merged"), expected(params, held)
    assert merged.shapes.keys() == want.keys() and merged.base is None
    for path, x in want.items():
        assert merged.dtypes[path] == np.float32
        np.testing.assert_allclose(merged.read(path), x, rtol=0, atol=2e-6, err_msg=path)
    assert report.parameters == sum(x.size for x in want.values())
    description = checkpoint.read_description(tmp_path / "merged")
    assert checkpoint.model_config(description, "x") == radfm.tiny()
    assert "base" not in description and description["preparation"] == PREPARATION
    assert description["source"]["origin"]["training"] == "adapt"
    assert description["source"]["merged"]["lora"]["rank"] == 2


@pytest.mark.slow
def test_a_merged_model_has_the_logits_of_the_run(runs, tmp_path):
    root, _ = runs
    merge(root / "nf4", tmp_path / "merged")
    run, merged = radfm_jax.load(root / "nf4"), radfm_jax.load(tmp_path / "merged")
    assert run.config.lora == LORA and merged.config == radfm.tiny()
    results = compare(root / "nf4", tmp_path / "merged")
    assert results["max difference"] < 2e-5 * results["largest logit of A"]
    # The base is not nf4 exactly.
    results = compare(root / "float32", tmp_path / "merged")
    assert results["max difference"] > 1e-2 * results["largest logit of A"]


def test_narrow_types_report_what_rounding_costs(runs, tmp_path):
    root, params = runs
    report = merge(root / "float32", tmp_path / "merged", dtype="bfloat16")
    merged, want = checkpoint.StoredParams(tmp_path / "merged"), expected(params, "float32")
    assert all(
        np.array_equal(merged.read(path), x.astype(ml_dtypes.bfloat16)) for path, x in want.items() if "/vit" in path
    )
    maps = [path for path in want if f"{path.removesuffix('/kernel')}/lora_a" in params]
    squares = lambda arrays: sum(float(np.sum(np.square(x, dtype=np.float64))) for x in arrays)  # noqa: E731
    error = squares(want[path] - merged.read(path).astype(np.float32) for path in maps)
    added = squares(want[path] - params[path] for path in maps)
    assert f"by {(error / added) ** 0.5:.1%} of what the adapters add" in report.lines[1]


def test_adapters_of_the_language_model_go_to_peft_and_back(runs, tmp_path):
    root, params = runs
    report = to_peft(root / "nf4", tmp_path / "adapter", base_model="org/name")
    lines = "\n".join(report.lines)
    assert "adapters of other parts are not in the folder: projection, vit/blocks/qkv" in lines
    assert (
        "the run also trained image_marks, llama, perceiver, projection, vit" in lines
        and "held its base in nf4" in lines
    )
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    )
    from_peft(tmp_path / "adapter", tmp_path / "back", base=root / "base", weights="nf4")
    description = checkpoint.read_description(tmp_path / "back")
    assert description["part"] == "radfm" and description["model"]["base"] == "nf4"
    assert description["preparation"] == PREPARATION and description["source"]["origin"]["training"] == "adapt"
    back = checkpoint.StoredParams(tmp_path / "back")
    own = [path for path, origin in back.origins.items() if origin != back.base]
    assert sorted(own) == sorted(path for path in params if lora.is_adapter(path) and path.startswith("llama/"))
    assert all(np.array_equal(back.read(path), params[path]) for path in own)


def test_what_is_refused(runs, tmp_path):
    root, _ = runs
    for dtype in ("int8", "nf4"):
        with pytest.raises(ValueError, match=f"merging into {dtype} loses the adapters"):
            merge(root / "float32", tmp_path / "x", dtype=dtype)
    with pytest.raises(ValueError, match="dtype 'float8' is unknown: choose one of float32, float16, bfloat16"):
        merge(root / "float32", tmp_path / "x", dtype="float8")
    with pytest.raises(ValueError, match="base has no adapters to merge"):
        merge(root / "base", tmp_path / "x")
    with pytest.raises(ValueError, match="exists: choose another name"):
        merge(root / "float32", root / "base")
    with pytest.raises(ValueError, match="has adapters over a base: merge them first"):
        to_torch(root / "float32", tmp_path / "x")
    other = shutil.copytree(root / "base", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    changed = next(name for name in manifest["files"] if "up.kernel/c/" in name)
    manifest["files"][changed]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was trained on another base than .*other, whose digest is"):
        merge(root / "float32", tmp_path / "x", base=other)
    assert not (tmp_path / "x").exists()


def test_a_description_that_does_not_fit_the_adapters(runs, tmp_path):
    """Rank and alpha in radfm.json scale the adapters, so another rank would merge other weights."""
    root, _ = runs

    def changed(change) -> Path:
        copy = shutil.copytree(root / "nf4", tmp_path / "copy", dirs_exist_ok=True)
        description = json.loads((root / "nf4" / "radfm.json").read_text())
        change(description)
        (copy / "radfm.json").write_text(json.dumps(description))
        (copy / "manifest.json").unlink()
        checkpoint.write_manifest(copy)
        return copy

    for change, words in (
        (lambda x: x["model"]["lora"].update(rank=4), "has the rank 2, but model.lora of radfm.json has the rank 4"),
        (lambda x: x["model"].pop("lora"), "has the rank 2, but .* has no adapters|has no adapters: it"),
        (lambda x: x["base"].pop("directory"), "is damaged: .*base must have the texts directory and sha256"),
        (lambda x: x["base"].update(sha256=5), "base must have the texts directory and sha256"),
        (lambda x: x.pop("base"), "has no adapters to merge|radfm.json has adapters, but no base: it is damaged"),
    ):  # fmt: skip
        for convert in (merge, to_peft):
            with pytest.raises(ValueError, match=words):
                convert(changed(change), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """290 MB of parameters in 40 layers are merged, over an nf4 base, in less than a third of that memory."""
    llama = radfm.DecoderConfig(vocab_size=40, width=256, mlp_width=2048, num_layers=40, num_heads=4, num_kv_heads=4,
                                head_dim=64)  # fmt: skip
    config = radfm.RadFMConfig(llama=llama)
    shapes = {path: (shape, np.dtype(np.float32)) for path, shape in table.param_shapes(config, "llama").items()}
    rng = np.random.default_rng(0)

    def write_random(directory, shapes, **fields):
        with checkpoint.new_directory(directory) as partial:
            writer = checkpoint.ParamWriter(partial, shapes, set(shapes))
            for path, (shape, _) in shapes.items():
                writer.write(path, rng.standard_normal(shape, np.float32))
            checkpoint.write_description(partial, "llama", **fields)

    write_random(tmp_path / "base", shapes, model={"llama": config.to_dict()["llama"]})
    small = {"llama/blocks/up/lora_a": (40, 256, 4), "llama/blocks/up/lora_b": (40, 4, 2048)}
    adapters = dataclasses.asdict(lora.LoraConfig(rank=4, targets=("llama/blocks/up",)))
    record = {"directory": str(tmp_path / "base"), "sha256": checkpoint.digest(tmp_path / "base")}
    model = {"llama": config.to_dict()["llama"], "lora": adapters, "base": "nf4"}
    write_random(tmp_path / "run", {p: (x, np.dtype(np.float32)) for p, x in small.items()}, model=model, base=record)
    code = """
        from radfm_jax.convert import merge as module
        from radfm_jax.checkpoints import checkpoint
        from radfm_jax.models import quantised
        import numpy as np
        for name, shape in {"query": (256, 4, 64), "out": (4, 64, 256), "up": (256, 2048), "down": (2048, 256)}.items():
            held = quantised.to_nf4(np.ones(shape, np.float32), quantised.INPUT_AXES[name])
            quantised.dequantise(f"llama/blocks/{name}/kernel", *held)  # compile first
        checkpoint.verify("base")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the memory in use now
        before = peak()
        report = module.merge("run", "merged")
        print(peak() - before, report.bytes)
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK + textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(radfm_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    assert size > 290e6
    assert growth < size / 3, f"peak memory grew by {growth / 1e6:.0f} MB for {size / 1e6:.0f} MB of parameters"

"""`python -m radfm_jax.convert`: its commands in sequence, its errors and its memory."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from convert_parts import PEAK, SMALL, save_bin, state_of, write_sizes
from test_convert import ROOT, small_checkpoint  # noqa: F401

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.tensor_files import TensorInfo, open_tensors, write_safetensors, write_torch_bin
from radfm_jax.models import radfm


def test_check_passes_fails_and_refuses(small_checkpoint, tmp_path, capsys):
    state = state_of()
    write = lambda name: save_bin(tmp_path / name, state)  # noqa: E731
    assert main(["check", str(small_checkpoint), str(write("same.bin"))]) == 0
    state["lang_model.model.norm.weight"][0] += 0.5
    assert main(["check", str(small_checkpoint), str(write("other.bin"))]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("max difference", "top-10 agreement", "KL(A || B)", "PASS", "FAIL"))
    assert main(["check", str(small_checkpoint), str(tmp_path / "nothing")]) == 2
    # A run directory selects a step, as in every command.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "5").symlink_to(small_checkpoint)
    assert main(["check", str(small_checkpoint), str(tmp_path / "run")]) == 0
    assert "error: " in capsys.readouterr().err


def test_commands_run_in_sequence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_bin(tmp_path / "x.bin", state_of())
    for command in (
        "from-torch x.bin ck --unused keep",
        "to-torch ck y.bin --layout plain",
        "to-hf ck llm",
        "from-hf llm llm_ck",
        "check llm_ck llm",
        "check ck llm",  # the language model of a RadFM
        "to-llama llm_ck again",  # the older names
        "from-llama again again_ck",
    ):
        assert main(command.split()) == 0, capsys.readouterr().err
    assert main("from-torch x.bin ck".split()) == 2
    assert "error: ck exists" in capsys.readouterr().err


def test_errors_exit_with_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "radfm_jax.convert", "from-torch", str(tmp_path / "no.bin"), str(tmp_path / "ck")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """290 MB of parameters in 40 layers convert in all directions in less than a third of that memory."""
    config = radfm.RadFMConfig(
        SMALL.vision,
        SMALL.perceiver,
        radfm.DecoderConfig(
            vocab_size=40, width=256, mlp_width=2000, num_layers=40, num_heads=4, num_kv_heads=4, head_dim=64
        ),
    )
    rng = np.random.default_rng(0)
    infos = {e.name: TensorInfo(e.torch_shape, np.dtype(np.float32)) for e in table.entries(config)}
    write_torch_bin(tmp_path / "x.bin", infos, lambda n: rng.standard_normal(infos[n].shape, np.float32))
    size = (tmp_path / "x.bin").stat().st_size
    code = """
        import json
        from radfm_jax.convert.from_torch import from_torch
        from radfm_jax.convert.to_torch import to_torch
        config = json.loads(Path("config.json").read_text())
        import torch
        from_torch("small.bin", "warm")
        to_torch("warm", "warm.bin")
        before = peak()
        from_torch("x.bin", "checkpoint", config=config)
        to_torch("checkpoint", "back.bin", layout="plain")
        to_torch("checkpoint", "export", part="hub", max_shard_bytes=10**8)
        from_torch("export", "again")
        print(peak() - before)
    """
    (tmp_path / "config.json").write_text(json.dumps({"model": config.to_dict()}))
    small = tmp_path / "sub"
    small.mkdir()
    save_bin(small / "small.bin", state_of())
    code = code.replace('"small.bin"', repr(str(small / "small.bin")))
    done = subprocess.run(
        [sys.executable, "-c", PEAK + textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)
    assert growth < size / 3, f"peak memory grew by {growth / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB"
    with open_tensors(tmp_path / "x.bin") as a, open_tensors(tmp_path / "back.bin") as b:
        assert all(np.array_equal(a.read(n), b.read(n)) for n in list(infos)[::37])
    digests = [
        {n: x for n, x in checkpoint.read_manifest(tmp_path / name).items() if n.startswith("params/llama")}
        for name in ("checkpoint", "again")
    ]
    assert digests[0] == digests[1] and len(digests[0]) > 300
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 1


def test_a_single_safetensors_file_converts(tmp_path):
    state = state_of()
    infos = {k: TensorInfo(v.shape, v.dtype) for k, v in state.items()}
    write_safetensors(tmp_path, infos, state.__getitem__)
    write_sizes(tmp_path / "model.safetensors", SMALL)
    from_torch(tmp_path / "model.safetensors", tmp_path / "checkpoint")
    assert radfm_jax.load(tmp_path / "checkpoint").config == SMALL

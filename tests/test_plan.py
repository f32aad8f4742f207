"""radfm_jax.cost: topologies, HLO text, candidates, and `python -m radfm_jax.plan`."""

import dataclasses
import json
import math
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from practice import practice

from configs import pretrain, tiny
from input_pipeline.batching.collate import collate_batch
from input_pipeline.batching.pipeline import Rows
from radfm_jax.cost import candidates, command, estimate, hlo, program, report
from radfm_jax.cost.topology import parse
from radfm_jax.runtime import sharding
from radfm_jax.training.experiment import Experiment

# --- topologies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, count, memory, bandwidth",
    [
        ("v5p:4x4x2", 32, 95 * 2**30, 270e9),  # three open axes: a ring needs 4 x 4 x 4
        ("v5p:4x4x4", 64, 95 * 2**30, 540e9),
        ("v4:2x2x1", 4, 32 * 2**30, 90e9),  # an axis of one has no neighbours
        ("v5e:8x8", 64, 16 * 2**30, 90e9),
        ("v5e:16x16", 256, 16 * 2**30, 180e9),
        ("v6e:4x8", 32, 32 * 2**30, 180e9),
        ("gpu:8xA100-80GB", 8, 80e9, 300e9),  # inside a node
        ("gpu:32xA100-80GB", 32, 80e9, 200e9),  # 8 adapters of 25 GB/s bring it into each node
        ("gpu:16xH100", 16, 80e9, 400e9),
        ("gpu:1xH200", 1, 141e9, None),
        ("gpu:1xRTX4090-24GB", 1, 24e9, None),
        ("gpu:2xl40s", 2, 48e9, 31.5e9),  # PCIe; there is one memory size
        ("gpu:8xRTX5090-32GB", 8, 32e9, 63e9),
        ("cpu:4", 4, None, None),
    ],
)
def test_topologies(text, count, memory, bandwidth):
    topology = parse(text)
    assert (topology.count, topology.memory, topology.bandwidth) == (count, memory, bandwidth)
    assert (topology.peak is None) == (topology.kind == "cpu")


@pytest.mark.parametrize(
    "text, words",
    [
        ("v5p:4x4", "a slice of v5p has 3 dimensions, for example v5p:4x4x2"),
        ("v7:4x4", "'v7:4x4' is not a topology; examples: v4:2x4x4"),
        ("gpu:8xA100", "choose a memory size: gpu:8xA100-40GB or gpu:8xA100-80GB"),
        ("gpu:0xH100", "is not a topology"),
        ("gpu:8xGTX1080", "is not a topology"),
        ("gpu:16xL40S-48GB", "gpu:16xL40S-48GB: at most 8, because L40S-48GB has no published network"),
    ],
)
def test_unknown_topologies_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


# --- HLO text ---------------------------------------------------------------------------------------------------------

# A loop of 5 trips gathers bf16[8, 64] over 4 devices. A loop inside it counts to 16 in steps of 2 and permutes f32[10]
# in both directions. The entry also all-reduces two arrays. A kernel's own text has lines that look like the end of a
# computation.
TEXT = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %inner_body (p: (f32[10], u32[])) -> (f32[10], u32[]) {
      %p = (f32[10]{0}, u32[]) parameter(0)
      %two = u32[]{:T(128)} constant(2)
      %i = u32[]{:T(128)} get-tuple-element(%p), index=1
      %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="x"}
      %x = f32[10]{0} get-tuple-element(%p), index=0
      %there.1 = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
      %here.1 = f32[10]{0} collective-permute-done(%there.1)
      %there.2 = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%here.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
      %here.2 = f32[10]{0} collective-permute-done(%there.2)
      ROOT %t = (f32[10]{0}, u32[]) tuple(%here.2, %next)
    }

    %inner_condition (p.1: (f32[10], u32[])) -> pred[] {
      %p.1 = (f32[10]{0}, u32[]) parameter(0)
      %end = u32[]{:T(128)} constant(16)
      %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
      ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
    }

    %body (q: (f32[10], u32[])) -> (f32[10], u32[]) {
      %q = (f32[10]{0}, u32[]) parameter(0)
      %kernel = f32[10]{0} custom-call(%q), backend_config={"text":{
     "of a kernel": "and
    }}, metadata={op_name="splash"}
      %gathered = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
      ROOT %inner = (f32[10]{0}, u32[]) while(%q), condition=%inner_condition, body=%inner_body
    }

    %condition (r: (f32[10], u32[])) -> pred[] {
      ROOT %opaque = pred[] custom-call(%r)
    }

    ENTRY %main (a: f32[100]) -> f32[100] {
      %a = f32[100]{0} parameter(0)
      %loop = (f32[10]{0}, u32[]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
      %sum = (f32[100]{0}, s8[100]{0}) all-reduce(%a, %b), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      %scattered = f32[25]{0} reduce-scatter(%a), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
      %alone = f32[100]{0} all-gather(%a), channel_id=6, replica_groups=[8,1]<=[8], dimensions={0}
      ROOT %out = f32[100]{0} copy(%a)
    }
    """)  # noqa: E501


def test_collectives_are_multiplied_by_trip_counts():
    traffic = hlo.traffic(TEXT)
    assert traffic.bytes == {
        "all-gather": 5 * 8 * 64 * 2 * 3 / 4,
        "reduce-scatter": 25 * 4 * 4 * 3 / 4,
        "all-reduce": 2 * (400 + 100) * 3 / 4,
        "all-to-all": 0,
        "collective-permute": 5 * 8 * 2 * 40,
    }
    assert traffic.counts["all-gather"] == 5 and traffic.counts["collective-permute"] == 80 and not traffic.unknown


def test_loops_of_unknown_length_are_reported():
    traffic = hlo.traffic(TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', ""))
    assert traffic.counts["all-gather"] == 1 and set(traffic.unknown) == {"gathered", "there.1", "there.2"}
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        hlo.traffic("")


# A gather in two pieces with the full shape each, before a loop and inside it.
PIECES = textwrap.dedent("""\
    %piece.1 (w: bf16[2,64]) -> bf16[8,64] {
      ROOT %gather.1 = bf16[8,64]{1,0} all-gather(%w), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
    }

    %piece.2 (w: bf16[2,64]) -> bf16[8,64] {
      ROOT %gather.2 = bf16[8,64]{1,0} all-gather(%w), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
    }

    %body (p: f32[]) -> f32[] {
      %one = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%piece.1
      ROOT %two = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%piece.2
    }

    %condition (r: f32[]) -> pred[] {
      ROOT %opaque = pred[] custom-call(%r)
    }

    ENTRY %main (a: f32[]) -> f32[] {
      %before.1 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%piece.1
      %before.2 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%piece.2
      ROOT %loop = f32[] while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
    }
    """)


def test_pieces_of_a_collective_are_counted_once():
    traffic = hlo.traffic(PIECES)
    assert traffic.counts["all-gather"] == 6 and traffic.bytes["all-gather"] == 6 * 8 * 64 * 2 * 3 / 4


def test_traffic_of_a_compiled_program():
    """FSDP gathers three layers over eight devices in the forward and again in the backward pass."""
    mesh = sharding.make_mesh()
    weights = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def loss(w, x):
        rows = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("fsdp")))  # noqa: E731
        layer = jax.checkpoint(lambda x, w: (rows(jnp.tanh(rows(x) @ w)), None))
        return jax.lax.scan(layer, x, w)[0].sum()

    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    traffic = hlo.traffic(gradient.lower(weights, x).compile().as_text())
    whole = 3 * 64 * 64 * 4 * 7 / 8
    assert not traffic.unknown
    assert traffic.bytes["all-gather"] == pytest.approx(2 * whole, rel=0.02)
    # XLA for CPUs does not reduce-scatter gradients.
    assert traffic.bytes["all-reduce"] == pytest.approx(2 * whole, rel=0.02)


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_planned_batch_matches_the_pipeline(tmp_path):
    data = practice(tmp_path)
    config = Experiment.from_dict(tiny.get_config())
    config = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, batch=4, accumulation=2))
    with Rows(data, "train", batch=4, host=0, hosts=1) as rows:
        real = collate_batch([(rows.empty_row, None)] * 4, data.planes).arrays
    planned = estimate.abstract_batch(config)
    assert {k: ((2, 2, *x.shape[1:]), x.dtype) for k, x in real.items()} == {
        k: (x.shape, x.dtype) for k, x in planned.items()
    }


def test_kernels_match_the_platform():
    config = Experiment.from_dict(pretrain.get_config())
    model = program.with_kernels(config, "tpu")
    # No kernel supports 32 queries (latents) over 1,056 keys.
    assert (model.llama.attention, model.vision.attention, model.perceiver.attention) == ("splash", "splash", "xla")
    assert program.with_kernels(config, "cpu").llama.attention == "blocks"


# --- candidates -------------------------------------------------------------------------------------------------------


def ranked(text: str, batch: int = 128):
    config = Experiment.from_dict(pretrain.get_config())
    return candidates.candidates(config, parse(text), [batch], 0.5)


def test_merged_micro_batches_send_a_quarter():
    """Compare the recommended setting for 32 A100 with the plain one."""
    config, topology = Experiment.from_dict(pretrain.get_config()), parse("gpu:32xA100-80GB")
    result, plain = ranked("gpu:32xA100-80GB"), candidates.plain(config, topology, 128, 0.5)
    assert len(result) == 3 * 5 and result[0].fits and result[0].config.train.accumulation == 1
    assert plain.config.train.accumulation == 4 and plain.rows == 1 and plain.config.train.remat == "full"
    assert result[0].traffic == plain.traffic / 4
    times = [c.step_seconds[1] for c in result if c.fits]
    assert times == sorted(times) and not any(c.fits for c in result[len(times) :])
    # Without overlap: arithmetic, and 3 x 2 bytes of each parameter at 200 GB/s.
    traffic = 3 * 2 * 13_123_822_336 * 31 / 32
    assert result[0].step_seconds[1] - result[0].compute == pytest.approx(traffic / 200e9)


def test_time_includes_recomputation():
    by_remat = {c.config.train.remat: c for c in ranked("gpu:32xA100-80GB") if c.rows == 4}
    row_flops = estimate.row_flops(by_remat["none"].config)
    assert candidates.executed_flops(by_remat["none"].config) == row_flops
    # Full remat adds a third, except for the head and the patch embedding.
    assert 1.30 < candidates.executed_flops(by_remat["full"].config) / row_flops < 1.34
    order = ["none", "dots", "projections", "attention", "full"]
    computed = [by_remat[name].compute for name in order]
    assert computed == sorted(computed) and len(set(computed)) == 5
    # The assumed MFU applies to full remat.
    assert by_remat["full"].compute == pytest.approx(row_flops * 128 / 32 / (0.5 * 312e12))


def test_compile_best_skips_candidates_that_do_not_compile_or_fit():
    compiled = []

    def compiler(candidate):
        compiled.append(candidate.config.train.remat)
        if len(compiled) == 1:
            raise program.CompileError("RESOURCE_EXHAUSTED")
        size = 33e9 if len(compiled) == 2 else 10e9  # of 34
        return program.Program(0, int(size), 0, {"all-gather": 5e9}, {"all-gather": 1}, 0, 60.0, 100.0)

    result, best = candidates.compile_best(ranked("v6e:4x8"), compiler)
    assert len(compiled) == 3 and best.config.train.remat == compiled[2] and best.program is not None
    failed = next(c for c in result if c.compile_error)
    assert failed.config.train.remat == compiled[0] and not failed.fits and result.index(failed) > result.index(best)
    assert best.traffic == 5e9 and best.total == 10e9 + best.memory["batch"] // 2


def test_batches_that_do_not_divide():
    config = Experiment.from_dict(pretrain.get_config())
    assert candidates.batch_for(config, parse("v5p:8x8x4")) == 256
    with pytest.raises(ValueError, match="a batch of 0 rows: must be at least 1"):
        candidates.candidates(config, parse("v5p:4x4x2"), [0], 0.5)
    with pytest.raises(ValueError, match="a batch of 100 rows does not divide over 32 devices"):
        candidates.candidates(config, parse("v5p:4x4x2"), [100], 0.5)


# --- the command ------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = command.main(list(arguments))
    return code, capsys.readouterr()


def test_the_command(tmp_path, capsys):
    """With --compile none, the printed lines match the JSON."""
    code, output = run(
        capsys, "--config=configs/pretrain.py", "--topology=gpu:32xA100-80GB", "--compile=none", "--price=2",
        f"--json={tmp_path / 'plan.json'}", f"--picture={tmp_path / 'plan.png'}",
    )  # fmt: skip
    assert code == 0 and (tmp_path / "plan.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "plan.json").read_text())
    take = result["take"]
    assert f"--config.train.accumulation={take['accumulation']} --config.train.remat={take['remat']}" in output.out
    assert take["memory_total"] == sum(take["memory_by_part"].values()) < 0.9 * 80e9
    assert "25% of what the plain program sends (arithmetic)" in output.out
    steps = estimate.epoch(Experiment.from_dict(pretrain.get_config()), pretrain.SIZES).steps
    cost = 2 * 32 * steps * take["seconds_not_hidden"] / 3600
    assert f" to {cost:,.0f}\n" in output.out and ", cost " in output.out and len(result["ladder"]) == 15
    assert math.isclose(result["take"]["can_hide"], 1.0)


def test_exit_codes(capsys):
    code, output = run(capsys, "--config=configs/pretrain.py", "--topology=gpu:1xA100-40GB", "--compile=none")
    assert code == 1 and "nothing fits with 10% of the memory left free" in output.out
    code, output = run(capsys, "--config=configs/pretrain.py", "--topology=gpu:32", "--compile=none")
    assert code == 2 and "is not a topology" in output.err
    code, output = run(capsys, "--config=configs/pretrain.py", "--topology=gpu:12xH100", "--compile=none")
    assert code == 1 and "99% of the parameters are on each device instead of 1/12" in output.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--price=-2",), "--price -2.0: must be at least 0"),
        (("--price=nan",), "--price nan: must be at least 0"),
        (("--batch=0",), "a batch of 0 rows: must be at least 1"),
        (("--config.train.accumulation=0",), "train.accumulation must be at least 1 (got 0)"),
        (("--json={folder}/none/plan.json",), "cannot be written"),
        (("--picture={folder}",), "cannot be written"),
    ],
)
def test_errors_are_one_line_and_precede_compilation(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "compiled", lambda *_, **__: pytest.fail("compiled"))
    options = ("--config=configs/pretrain.py", "--topology=gpu:32xA100-80GB", *arguments)
    code, output = run(capsys, *(argument.format(folder=tmp_path) for argument in options))
    assert code == 2 and output.err.startswith("error: ") and words in output.err and not output.out


def test_arithmetic_is_labelled_and_roofline_includes_links(capsys):
    code, output = run(capsys, "--config=configs/pretrain.py", "--topology=v6e:4x8", "--compile=none")
    assert code == 0 and "of what the plain program sends (arithmetic)" in output.out
    config = Experiment.from_dict(pretrain.get_config())
    slow = candidates.candidates(config, parse("gpu:256xH100"), [256], 0.4)[0]
    assert report.roofline(slow) == slow.step_seconds[1] - slow.compute > slow.compute * 0.4
    assert report.brief(0.0) == "0.0" and report.brief(0.0030) == "0.0030" and report.brief(1234.5, 0) == "1,234"


@pytest.mark.slow
def test_compilations_for_simulated_devices_are_cached(tmp_path, monkeypatch, capsys):
    """Plan the tiny model for two devices twice; the second run compiles nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ("--config=configs/tiny.py", "--topology=cpu:2", "--config.train.batch=2", "--config.train.remat=full")
    code, output = run(capsys, *arguments)
    assert code == 0 and "compiled batch 2 = 1 x 1 per device" in output.err
    assert "memory, compiled for 2 simulated CPU devices" in output.out and "sent, compiled" in output.out
    code, again = run(capsys, *arguments)
    assert code == 0 and "compiled batch" not in again.err
    assert [line for line in again.out.splitlines() if line.startswith("memory")] == [
        line for line in output.out.splitlines() if line.startswith("memory")
    ]

"""`python -m radfm_jax.convert`: the command line."""

from __future__ import annotations

import argparse
import functools
import os
import resource
import sys
import time

import absl.logging
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from input_pipeline.console import SafeConsole
from input_pipeline.messages import printable
from radfm_jax import terminal
from radfm_jax.convert.report import Report

DESCRIPTION = """\
Convert weights between PyTorch and Orbax, in either direction, merge adapters or exchange them with PEFT, and check the
result. Peak memory does not depend on the size of the model.
"""
EXAMPLES = """\
examples:
  # the released checkpoint (the .bin, or the zip around it) -> a checkpoint directory
  python -m radfm_jax.convert from-torch pytorch_model.bin radfm/ --tokenizer tokenizer.model --unused keep
  # and back, for the released PyTorch code
  python -m radfm_jax.convert to-torch radfm/ pytorch_model.bin
  # ... or as a folder of safetensors with config.json, tokenizer and model card
  python -m radfm_jax.convert to-torch radfm/ radfm_safetensors/ --dtype bfloat16
  # a trained model for transformers: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
  python -m radfm_jax.convert to-hf runs/mine/ folder/ --dtype bfloat16
  # a language model of Hugging Face to start training from, and back
  python -m radfm_jax.convert from-hf Qwen3-8B/ qwen3/
  python -m radfm_jax.convert to-hf qwen3/ Qwen3-8B_again/
  # a language model and a vision encoder in one checkpoint
  python -m radfm_jax.convert from-hf Qwen3-8B/ start/ --vision medsiglip-448/
  # a run that trained adapters (model.lora) as one checkpoint, which every command and `load` take
  python -m radfm_jax.convert merge runs/adapted/ merged/ --dtype bfloat16
  # its adapters for peft.PeftModel.from_pretrained, and adapters of PEFT over a checkpoint
  python -m radfm_jax.convert to-peft runs/adapted/ adapter/ --base-model Qwen/Qwen3-8B
  python -m radfm_jax.convert from-peft adapter/ adapted/ --base start/
  # compare the logits of two checkpoints of any format
  python -m radfm_jax.convert check radfm/ pytorch_model.bin

A checkpoint directory contains its sizes and tokenizer. To use it:
  radfm_jax.load("radfm/")
"""
DTYPES = ("float32", "bfloat16", "float16")
ADAPTER_COMMANDS = ("merge", "to-peft", "from-peft")


def parser() -> argparse.ArgumentParser:
    top = terminal.parser("python -m radfm_jax.convert", DESCRIPTION, EXAMPLES)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = functools.partial(conversion, commands)
    sub = command(
        "from-torch", "released RadFM weights -> checkpoint directory",
        "pytorch_model.bin, the zip it is published in, a .safetensors file or a folder of them",
        "checkpoint directory to create", reads_torch=True,
    )  # fmt: skip
    sub.add_argument(
        "--unused", choices=("keep", "drop"), default="drop",
        help="keep or drop the 143M parameters that RadFM never uses (default: %(default)s)",
    )  # fmt: skip
    sub = command(
        "to-torch", "checkpoint directory -> released names", "checkpoint directory",
        "a file x.bin, or a folder to create (safetensors, config.json, tokenizer, model card)",
    )  # fmt: skip
    sub.add_argument(
        "--layout", choices=("4.28", "plain"), default="4.28",
        help="4.28 adds the 41 buffers that the released code's strict load needs (default: %(default)s)",
    )  # fmt: skip
    sub = command(
        "from-hf", "Hugging Face folders -> checkpoint directory of a language model (LLaMA, Mistral, Qwen, SmolLM, "
        "Gemma, Phi), a vision encoder (--vision), or both; or of a RadFM that to-hf wrote",
        "folder with config.json and weights of a language model or a RadFM; only --vision may be given instead",
        "checkpoint directory to create", reads_torch=True, aliases=("from-llama",), nargs="?",
    )  # fmt: skip
    sub.add_argument("--vision", metavar="DIR", help="folder of a vision encoder: SigLIP, DINOv2, or a model that has "
                     "a SigLIP")  # fmt: skip
    sub.add_argument("--image-size", metavar="N", type=int, help="side of the encoder's scans in pixels; its positions "
                     "are interpolated (default: that of the folder)")  # fmt: skip
    sub = command(
        "to-hf", "checkpoint directory -> Hugging Face folder that transformers runs, with the code of the model",
        "run, or checkpoint directory of a RadFM or of a language model", "folder to create",
    )  # fmt: skip
    sub.add_argument("--part", choices=("all", "llama"), default="all", help="llama: the language model alone, as a "
                     "folder of its own class (default: %(default)s)")  # fmt: skip
    sub.add_argument("--scores", metavar="DIR", help="output directory of `radfm_jax.evaluate`, for the model card")
    sub = command(
        "to-llama", "the same as to-hf --part llama", "checkpoint directory of a RadFM or of a language model",
        "folder to create",
    )  # fmt: skip
    sub.set_defaults(part="llama", scores=None)
    add_adapter_commands(commands)
    sub = plain_conversion(commands, "push", "exported folder -> repository of the Hugging Face Hub", PUSH,
                           "folder of to-hf, to-torch or to-peft", "OWNER/NAME")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    sub.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    sub = commands.add_parser(
        "check",
        help="compare the logits of two checkpoints on the same random inputs",
        description="Compare the logits of A and B. The folder of a RadFM that to-hf wrote is run by transformers, "
        "everything else by this package. Exits with 1 beyond the tolerance.",
    )
    sub.add_argument("a", metavar="A", help="checkpoint directory, run directory, PyTorch file or folder")
    sub.add_argument("b", metavar="B", help="the same")
    sub.add_argument("--config", metavar="FILE", help="as in from-torch, for PyTorch files without config.json")
    sub.add_argument("--tolerance", type=float, default=1e-3, help="maximum logit difference (default: %(default)s)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    return top


PUSH = """\
Upload an exported folder to a repository of the Hugging Face Hub, with the token of `hf auth login`. Names, sizes and
SHA-256 of all files are listed first. For research only: the model card must keep its warning.
"""
MERGE = """\
Add the adapters of a run to the weights of its base, and write the sum as one checkpoint without adapters or base. A
base that the run held in bfloat16, int8 or nf4 is converted to that type first, so that the merged model answers as the
run did.
"""
TO_PEFT = """\
Write the adapters of a run's language model as a folder of PEFT: adapter_config.json and adapter_model.safetensors.
Adapters of the vision encoder or the perceiver have no place in it, nor have their weights; the report lists them. Use
`merge` for the whole model.
"""
FROM_PEFT = """\
Convert the LoRA folder of a language model to a checkpoint with adapters over --base. --base must have the weights that
the adapters were trained on: convert that folder of Hugging Face with from-hf first. DoRA, modules_to_save, biases and
ranks of single modules are refused.
"""


def add_adapter_commands(commands) -> None:
    """Add the commands for runs that trained adapters."""
    moved = {"metavar": "DIR", "help": "checkpoint directory of the base, if it is not where it was during training"}
    run = "training run with adapters, or one of its checkpoints"
    sub = plain_conversion(commands, "merge", "adapters of a run -> weights of one checkpoint", MERGE, run,
                           "checkpoint directory to create")  # fmt: skip
    sub.add_argument("--dtype", metavar="DTYPE", default="float32", help="float32, bfloat16 or float16: dtype of all "
                     "weights. 16 bits round away a part of the adapters; the report says how much (default: "
                     "%(default)s)")  # fmt: skip
    sub.add_argument("--base", **moved)
    sub = plain_conversion(commands, "to-peft", "adapters of a run -> folder for peft.PeftModel.from_pretrained",
                           TO_PEFT, run, "folder to create")  # fmt: skip
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the adapters (default: unchanged)")
    sub.add_argument("--base", **moved)
    sub.add_argument("--base-model", metavar="NAME", help="Hugging Face id or folder of the base, which the "
                     "folder records; a folder is compared with the run (default: that of from-peft)")  # fmt: skip
    sub = plain_conversion(commands, "from-peft", "LoRA folder of PEFT -> checkpoint directory over a base", FROM_PEFT,
                           "folder with adapter_config.json and adapter_model.safetensors",
                           "checkpoint directory to create; it has only the adapters")  # fmt: skip
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the stored adapters (default: unchanged)")
    sub.add_argument("--base", metavar="DIR", required=True, help="checkpoint directory, or run, whose language model "
                     "the adapters were trained on")  # fmt: skip
    sub.add_argument(
        "--weights", choices=("float32", "bfloat16", "int8", "nf4"), default="float32",
        help="how the base is held when the checkpoint is loaded, such as nf4 for QLoRA (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--any-base", action="store_true", help="accept a base with another digest than to-peft recorded, "
                     "for one with the same weights in another dtype")  # fmt: skip


def plain_conversion(commands, name: str, help: str, description: str, src: str, dst: str) -> argparse.ArgumentParser:
    """Add a command with SRC and DST."""
    sub = commands.add_parser(name, help=help, description=description)
    sub.add_argument("src", metavar="SRC", help=src)
    sub.add_argument("dst", metavar="DST", help=dst)
    return sub


def conversion(
    commands,
    name: str,
    help: str,
    src: str,
    dst: str,
    *,
    reads_torch=False,
    aliases: tuple[str, ...] = (),
    **src_options,
) -> argparse.ArgumentParser:
    """Add a command with SRC, DST and the options of all conversions."""
    sub = commands.add_parser(name, aliases=aliases, help=help, description=help)
    sub.set_defaults(command=name)
    sub.add_argument("src", metavar="SRC", help=src, **src_options)
    sub.add_argument("dst", metavar="DST", help=dst)
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the stored parameters (default: unchanged)")
    if reads_torch:
        sub.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model or tokenizer.json (default: next "
                         "to SRC)")  # fmt: skip
        sub.add_argument(
            "--config", metavar="FILE", help="config.json or configs/*.py, for sizes that tensor shapes do not "
            "give, such as attention heads, and for the preparation of scans (default: SRC's x.config.json or "
            "config.json next to it)",
        )  # fmt: skip
        sub.add_argument("--trim-vocabulary", action="store_true", help="drop the rows of the vocabulary that the "
                         "tokenizer lacks, which are padding")  # fmt: skip
        sub.add_argument("--no-verify", action="store_true", help="skip the checksums of SRC")
    return sub


class ProgressBar:
    """A `report.Progress` on the terminal."""

    def __init__(self, console: Console):
        sizes = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.rich = Progress(TextColumn("{task.description}"), BarColumn(), *sizes, console=console, transient=True)
        self.task = self.rich.add_task("", total=None)

    def stage(self, name: str, total: int | None) -> None:
        if not self.rich.console.is_terminal:  # rich shows no bar in the log of a batch job
            size = f" {total / 1e9:.2f} GB" if total else ""
            self.rich.console.print(f"{name}{size} ...", highlight=False)
        self.rich.reset(self.task, description=name, total=total)

    def advance(self, done: int) -> None:
        self.rich.advance(self.task, done)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # Conversion needs no accelerator. JAX would otherwise reserve one, or fail on one that is in use.
    if args.command != "check":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about merges that it skips
    console = SafeConsole(stderr=True)  # progress and errors; results go to standard output
    try:
        commands = {"check": _check, "push": _push}
        return commands.get(args.command, _convert)(args, console)
    except KeyboardInterrupt:
        console.print("interrupted, nothing was written", style="red")
        return 130
    except (ValueError, ImportError, OSError) as e:
        terminal.message(f"error: {e}", style="red")
        return 2


def _convert(args: argparse.Namespace, console: Console) -> int:
    start = time.monotonic()
    bar = ProgressBar(console)
    with bar.rich:
        report = (_convert_adapters if args.command in ADAPTER_COMMANDS else _convert_weights)(args, bar)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sources = [src for src in (args.src, getattr(args, "vision", None)) if src]
    print(f"{' + '.join(sources)} -> {args.dst}")
    print(
        f"{report.parameters:,} parameters, {', '.join(report.dtypes)}, {report.bytes / 1e9:.2f} GB in {seconds:.1f} s "
        f"({report.bytes / 1e6 / seconds:.0f} MB/s), peak memory {peak:.2f} GB"
    )
    for line in report.lines:
        print(printable(f"- {line}"))
    return 0


def _convert_weights(args: argparse.Namespace, bar: ProgressBar) -> Report:
    from radfm_jax.checkpoints import checkpoint, run_directory
    from radfm_jax.convert import from_torch, model_config, to_torch

    common = {"dtype": args.dtype, "progress": bar}
    if args.command == "to-torch":
        src = run_directory.select_checkpoint(args.src)
        return to_torch.to_torch(src, args.dst, layout=args.layout, **common)
    if args.command.startswith("to"):
        src = run_directory.select_checkpoint(args.src)
        whole = args.part == "all" and checkpoint.read_description(src)["part"] == "radfm"
        return to_torch.to_torch(src, args.dst, part="hub" if whole else "llama", scores=args.scores, **common)
    part = "llama" if args.command.endswith("hf") else "radfm"
    config = model_config.read_config(args.config) if args.config else None
    options = {"config": config, "tokenizer": args.tokenizer, "unused": getattr(args, "unused", "drop")}
    options["trim_vocabulary"] = args.trim_vocabulary
    if part == "llama":
        options |= {"vision": args.vision, "image_size": args.image_size}
    return from_torch.from_torch(args.src, args.dst, part=part, verify=not args.no_verify, **options, **common)


def _convert_adapters(args: argparse.Namespace, bar: ProgressBar) -> Report:
    from radfm_jax.convert.merge import merge
    from radfm_jax.convert.peft.reading import from_peft
    from radfm_jax.convert.peft.writing import to_peft

    common = {"dtype": args.dtype, "base": args.base, "progress": bar}
    if args.command == "merge":
        return merge(args.src, args.dst, **common)
    if args.command == "to-peft":
        return to_peft(args.src, args.dst, base_model=args.base_model, **common)
    return from_peft(args.src, args.dst, any_base=args.any_base, weights=args.weights, **common)


def _push(args: argparse.Namespace, console: Console) -> int:
    from radfm_jax.convert.push import push

    if address := push(args.src, args.dst, public=args.public, dry_run=args.dry_run):
        print(address)
    return 0


def _check(args: argparse.Namespace, console: Console) -> int:
    from radfm_jax.convert import model_config
    from radfm_jax.convert.check import compare

    config = model_config.read_config(args.config) if args.config else None
    with console.status("comparing"):
        results = compare(args.a, args.b, config=config, seed=args.seed, dtype=args.dtype)
    passed = results["max difference"] <= args.tolerance  # False for NaN
    formats = {"positions": "d", "largest logit of A": ".3f", "top-1 agreement": ".2%", "top-10 agreement": ".2%"}
    for name, value in results.items():
        print(f"{name:20s} {value:{formats.get(name, '.3e')}}")
    print(f"{'PASS' if passed else 'FAIL'}: tolerance {args.tolerance:g}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

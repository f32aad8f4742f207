"""`radfm COMMAND ...`: the console script. Each command is also a `python -m` module, which is the name in its help."""

import importlib
import sys

from input_pipeline.files import nearest

COMMANDS = {
    "train": ("radfm_jax.train", "train a model, or resume a run"),
    "ask": ("radfm_jax.generate", "answer questions about scans"),
    "evaluate": ("radfm_jax.evaluate.__main__", "score a checkpoint: test rows, RadBench, ratings"),
    "convert": ("radfm_jax.convert.__main__", "convert weights between PyTorch and Orbax"),
    "plan": ("radfm_jax.plan", "check whether a run fits on given hardware, and how long it takes"),
    "summary": ("radfm_jax.summary", "show a chain of training runs on one page"),
    "prepare": ("input_pipeline.prepare", "read and check all data once, and write its index"),
    "inspect": ("input_pipeline.inspect.__main__", "show what the model will see, as a page"),
    "series": ("input_pipeline.series.__main__", "list the series of a DICOM study, and write them as NIfTI"),
    "curate": ("input_pipeline.curate.__main__", "build MedMD and RadMD from published sources"),
    "phantoms": ("input_pipeline.phantoms.__main__", "write labelled practice scans"),
}


def usage() -> str:
    lines = (f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    return "\n".join(
        ["usage: radfm COMMAND ...", "", *lines, "", "radfm COMMAND --help lists the options of a command.",
         "Research only, not for clinical use."]
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int | None:
    """Run the command that the first argument names. Returns its exit code; 2 for an unknown command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name not in COMMANDS:
        print(f"{usage()}\n\nradfm: unknown command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())

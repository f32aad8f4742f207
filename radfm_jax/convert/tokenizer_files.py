"""The tokenizer next to some weights: which files it has, and whether it fits the vocabulary."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from input_pipeline.text.tokenizer import HUGGING_FACE, HUGGING_FACE_FILES, SENTENCEPIECE, load_tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The file of a tokenizer (None without one), its number of ids, and all files that belong to it."""

    main: Path | None = None
    size: int | None = None
    all: tuple[Path, ...] = ()

    @classmethod
    def of(cls, src, tokenizer, part: str) -> TokenizerFiles:
        """Return the tokenizer next to `src`, or the file or folder that the user passes.

        If there are both kinds, a RadFM has the SentencePiece model, and a language model has tokenizer.json. Raises
        ValueError if the tokenizer does not exist or is invalid.
        """
        if tokenizer and not Path(tokenizer).exists():
            raise ValueError(f"tokenizer {tokenizer} does not exist")
        path = Path(tokenizer or src)
        if path.is_file() and tokenizer:
            main = path
        else:
            folder = path if path.is_dir() else path.parent
            names = (SENTENCEPIECE, HUGGING_FACE) if part == "radfm" else (HUGGING_FACE, SENTENCEPIECE)
            main = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
            if not main.is_file():
                return cls(main)
        if main.suffix != ".json":
            return cls(main, piece_count(main), (main,))
        others = [main.with_name(name) for name in (*HUGGING_FACE_FILES[1:], SENTENCEPIECE)]
        return cls(main, load_tokenizer(main).size, (main, *(p for p in others if p.is_file())))

    def check(self, vocab_size: int) -> None:
        """Raise ValueError unless the tokenizer fits a vocabulary. A Hugging Face tokenizer may have fewer ids."""
        if self.size is None:
            return
        if self.main.suffix == ".json":
            load_tokenizer(self.main, vocab_size=vocab_size)
        else:
            check_pieces(self.main, self.size, vocab_size)

    def copy(self, directory: Path) -> None:
        """Copy the files to a checkpoint directory, under their usual names."""
        for path in self.all:
            is_main = path == self.main
            name = path.name if not is_main else HUGGING_FACE if path.suffix == ".json" else SENTENCEPIECE
            shutil.copyfile(path, directory / name)


def piece_count(path: Path) -> int:
    """Return the number of pieces of a SentencePiece model. Raises ValueError if `path` is something else, or empty."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{path} is not a SentencePiece model: {e}") from None
    if not pieces:
        raise ValueError(f"{path} has no pieces: pass the model's own tokenizer")
    return pieces


def check_pieces(path: Path, pieces: int, vocab_size: int) -> None:
    """Raise ValueError unless the vocabulary has a row for each piece of the tokenizer and no others."""
    if pieces < vocab_size:
        raise ValueError(
            f"vocabulary of {path} is {pieces:,}, but the embedding has {vocab_size:,} rows: pass the model's own "
            f"tokenizer. If the other {vocab_size - pieces:,} rows are padding or tokens that no text has ([PAD]), "
            "--trim-vocabulary drops them"
        )
    if pieces > vocab_size:
        raise ValueError(
            f"vocabulary of {path} is {pieces:,}, but the embedding has {vocab_size:,} rows: pass the model's own "
            "tokenizer"
        )

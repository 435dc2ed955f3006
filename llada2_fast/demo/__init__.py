"""The embedded demonstration model: a 1.1 M-parameter LLaDA2 that knows five toy tasks, as a LLaDA2.1 and as a 2.2.

`path()` names the checkpoint folder inside the package (config, bf16 safetensors, tokenizer, model card). The other
modules say how it was made: `tasks` generates and checks prompts, `tokenizer` builds the vocabulary, `train` trains
and exports the weights.
"""

from pathlib import Path

FOLDERS = {"2.1": "model", "2.2": "model-2.2"}


def path(variant: str = "2.1") -> str:
    """Return the folder of the embedded checkpoint, as an absolute path that `from_pretrained` accepts.

    variant: "2.1", or "2.2", which routes experts by block, deletes and inserts. ValueError for another.
    """
    if variant not in FOLDERS:
        raise ValueError(f"variant={variant!r:.80}: expected one of {', '.join(FOLDERS)}")
    return str(Path(__file__).resolve().parent / FOLDERS[variant])

"""The embedded demonstration model: a 1.1 M-parameter LLaDA2 that knows five toy tasks.

`path()` names the checkpoint folder inside the package (config, bf16 safetensors, tokenizer, model card). The other
modules say how it was made: `tasks` generates and checks prompts, `tokenizer` builds the vocabulary, `train` trains
and exports the weights.
"""

from pathlib import Path


def path() -> str:
    """Return the folder of the embedded checkpoint, as an absolute path that `from_pretrained` accepts."""
    return str(Path(__file__).resolve().parent / "model")

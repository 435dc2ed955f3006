"""The README's Python runs as it stands, but for the model (the embedded one) and the device."""

import re
from pathlib import Path

import pytest

from llada2_fast import demo

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
WORDS = {  # a call of each block -> a word of its output
    "model.generate": "spell",
    "pipe(": "spell",
    "theirs(": "The answer is 943.",
    "writer(": "The answer is 943.",
    "Engine(": "The answer is 943.",
    "BlockState": "The answer is 943.",
}


def test_there_is_a_block_for_each_face():
    assert len(BLOCKS) == len(WORDS)
    assert all(any(call in block for block in BLOCKS) for call in WORDS)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: next(call for call in WORDS if call in block))
def test_python_block(block, capsys):
    for there, here in (
        ('"inclusionAI/LLaDA2.1-mini"', repr(demo.path())),
        ('device="cuda"', 'device="cpu"'),
        ("gen_length=512", "gen_length=64"),
        ("gen_length=256", "gen_length=64"),
    ):
        block = block.replace(there, here)
    exec(compile(block, "README.md", "exec"), {})
    word = next(word for call, word in WORDS.items() if call in block)
    assert word in capsys.readouterr().out

"""The decoding order as text and as a picture, on the embedded model's own traces."""

import re

import pytest
import torch

from benchmarks import harness, order, quality
from llada2_fast import LLaDA2Model, demo
from llada2_fast.weights.special_tokens import load_tokenizer

EDITED = "Spell 8313, 602, 939."  # at a threshold of 0.5 its second block is edited


@pytest.fixture(scope="module")
def edited():
    """trace, number of tokens, tokenizer and answer's ids of a decoding with edits."""
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    tokenizer = load_tokenizer(demo.path())
    output = model.generate(
        quality.encode(tokenizer, [EDITED]), gen_length=64, threshold=0.5, editing_threshold=0.5, eos_early_stop=True,
        return_dict=True, trace=True,
    )  # fmt: skip
    return output.trace[0], output.num_tokens[0], tokenizer, output.sequences[0]


def test_lines_tell_every_write(edited):
    trace, count, tokenizer, ids = edited
    events, _ = order.shown(trace, count)
    edits = sum(event.kind == "edit" for event in events)
    lines = list(order.lines(trace, count, tokenizer))
    assert edits > 0 and sum(line.count("{") for line in lines) == edits
    assert sum(line.count("[") for line in lines) == count  # each position is committed once
    assert [int(re.search(r"(\d+) written", line)[1]) for line in lines] == [
        sum(event.step == step for event in events) for step in sorted({event.step for event in events})
    ]
    last = {}
    for event in events:
        last[event.position] = event.token
    assert [last[at] for at in range(count)] == ids[:count].tolist()


def test_the_picture_marks_commits_and_edits(edited):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    trace, count, tokenizer, _ = edited
    figure, axes = pyplot.subplots(2)
    order.draw(trace, count, tokenizer, *axes)
    events, first_steps = order.shown(trace, count)
    _, commits, edits = axes[0].collections  # behind them the lines of waiting positions
    assert {tuple(xy) for xy in commits.get_offsets().tolist()} == {
        (e.position, e.step) for e in events if e.kind == "commit"
    }
    assert len(edits.get_offsets()) == sum(event.kind == "edit" for event in events)
    assert sorted(commits.get_array().tolist()) == sorted(
        event.step - first_steps[event.block] for event in events if event.kind == "commit"
    )
    assert [bar.get_height() for bar in axes[1].patches] == [e.confidence for e in events if e.kind == "commit"]
    pyplot.close(figure)


def test_command_writes_text_and_image(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image = tmp_path / "order.png"
    order.main(["--prompt", "Add 847 and 96.", "--out", str(image)])
    printed = capsys.readouterr().out
    assert "The answer is 943." in printed and printed.startswith("step   0  block")
    assert image.read_bytes().startswith(b"\x89PNG")


def test_what_it_needs_is_said_ahead_of_the_work(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        order.main(["--out", str(tmp_path / "nowhere" / "order.png")])
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        order.main(["--out", str(tmp_path / "order.png")])
    assert "llada2-fast[plot]" in capsys.readouterr().err

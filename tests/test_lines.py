"""Files of JSON lines whose writers may be killed."""

from benchmarks.lines import append_line, lines_of


def test_what_was_not_written_to_its_end_is_neither_read_nor_kept(tmp_path):
    path = tmp_path / "some.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"b": "\n\u00e4"})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"c": ')
    assert lines_of(path) == [{"a": 1}, {"b": "\n\u00e4"}]
    append_line(path, {"d": 2})
    assert lines_of(path) == [{"a": 1}, {"b": "\n\u00e4"}, {"d": 2}]


def test_a_first_line_that_was_not_written_to_its_end(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"a"', "utf-8")
    assert lines_of(path) == []
    append_line(path, {"b": 1})
    assert path.read_bytes() == b'{"b": 1}\n'

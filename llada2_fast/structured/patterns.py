"""A pattern of a JSON schema -> a regular expression of JSON strings that it matches."""

import re

try:  # no public module parses regular expressions as `re`, and so jsonschema, understands them
    from re import _parser
except ImportError:  # Python 3.10
    import sre_parse as _parser

MAX_COUNT = 10_000  # of repetitions, items and characters

_SAFE = r'[^"\\\x00-\x1F\x7F-\x9F]'  # what stands in a JSON string as it is; C1 controls are left out as by the library
_CATEGORIES = {  # of ASCII alone, where Rust and Python agree
    "CATEGORY_DIGIT": "0-9",
    "CATEGORY_NOT_DIGIT": " -/:-~",
    "CATEGORY_SPACE": " ",
    "CATEGORY_NOT_SPACE": "!-~",
    "CATEGORY_WORD": "0-9A-Z_a-z",
    "CATEGORY_NOT_WORD": r" -/:-@\[-\^`{-~",
}


def string_pattern(pattern: str) -> str:
    """The expression, in Rust's syntax, of the JSON strings that a pattern matches as a whole, with their quotes.

    pattern: in the syntax of `re`. What JSON has to escape and C1 controls are left out of classes and `.`; \\d, \\w,
        \\s and their opposites are of printable ASCII.
    Raises ValueError for what is no pattern and for what is not supported: flags, lookaround, references to groups,
    anchors inside, characters that JSON has to escape.
    """
    try:
        tree = _parser.parse(pattern)
    except (TypeError, OverflowError, re.error) as error:
        raise ValueError(f"{error}; expected a regular expression") from None
    if tree.state.flags & ~re.UNICODE:
        raise ValueError("flags are not supported")
    return f'"(?:{_sequence(tree, True, True)})"'


def _sequence(nodes, first, last):
    """Nodes of re's parser, one behind the other. first, last: whether they begin and end the pattern."""
    ends = len(nodes) - 1
    return "".join(_node(str(op), value, first and i == 0, last and i == ends) for i, (op, value) in enumerate(nodes))


def _node(op, value, first, last):
    if op == "LITERAL":
        if not _safe(value):
            raise ValueError(f"{chr(value)!r} has to be escaped in JSON, or is a control character or a surrogate")
        return _character(value)
    if op == "ANY":
        return _SAFE
    if op in ("IN", "NOT_LITERAL"):
        return _class(value if op == "IN" else [("NEGATE", None), ("LITERAL", value)])
    if op == "BRANCH":
        return f"(?:{'|'.join(_sequence(one, first, last) for one in value[1])})"
    if op == "SUBPATTERN" and not (value[1] or value[2]):  # flags that it adds and takes away
        return f"(?:{_sequence(value[3], first, last)})"
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, nodes = value
        endless = high == _parser.MAXREPEAT
        if max(low, 0 if endless else high) > MAX_COUNT:
            raise ValueError(f"more than {MAX_COUNT} repetitions")
        return f"(?:{_sequence(nodes, False, False)}){{{low},{'' if endless else high}}}"
    if op == "AT" and (first and str(value).startswith("AT_BEGINNING") or last and str(value).startswith("AT_END")):
        return ""
    raise ValueError(f"{op} is not supported here")  # lookaround, references to groups, anchors inside


def _class(items):
    """A class of characters, of them those that JSON need not escape."""
    negated = str(items[0][0]) == "NEGATE"
    members, within, empty = "", "", not negated
    for op, value in items[negated:]:
        if str(op) == "CATEGORY":
            members += _CATEGORIES[str(value)]
            within, empty = "[ -~]&&", False
        else:
            first, last = value if str(op) == "RANGE" else (value, value)
            members += f"{_character(first)}-{_character(last)}"
            empty = empty and not any(map(_safe, range(first, last + 1)))
    if empty:
        raise ValueError("a class of which JSON has to escape all characters")
    # The categories are narrower than those of `re`: outside ASCII their opposite would be too wide.
    return f"[{within if negated else ''}[{'^' * negated}{members}]&&{_SAFE}]"


def _safe(code):
    return code >= 0x20 and chr(code) not in '"\\' and not 0x7F <= code <= 0x9F and not 0xD800 <= code <= 0xDFFF


def _character(code):
    if 0xD800 <= code <= 0xDFFF:
        raise ValueError("a surrogate, which is no character")
    return chr(code) if chr(code).isalnum() else f"\\x{{{code:X}}}"

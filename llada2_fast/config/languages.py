"""Checks of what an answer has to be. Whether it can be had is llada2_fast.structured's to say."""

import json

from .checks import bad

LANGUAGES = ("regex", "json_schema", "choices")  # fields of DecodeParams, of which one may be given
MAX_STATES = 4096  # of a language, unless an engine's config says otherwise
MAX_PATTERN = 65536  # characters of a regular expression, of a schema as JSON, of all choices


def as_pattern(name, value):
    if not isinstance(value, str) or len(value) > MAX_PATTERN or not _is_text(value):
        raise bad(name, value, f"a string of at most {MAX_PATTERN} characters")
    return str(value)


def as_choices(name, value):
    choices = value if isinstance(value, (list, tuple)) else ()
    texts = all(isinstance(one, str) and one and _is_text(one) for one in choices)
    if not choices or not texts or sum(map(len, choices)) > MAX_PATTERN:
        raise bad(name, value, f"texts that are not empty, of at most {MAX_PATTERN} characters in all")
    return tuple(map(str, choices))


def as_schema(name, value):
    """A copy, which nobody changes later."""
    allowed = f"a JSON schema, a dict of what JSON has, of at most {MAX_PATTERN} characters"
    if not isinstance(value, dict):
        raise bad(name, value, allowed)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise bad(name, value, allowed) from None
    if len(text) > MAX_PATTERN or not _is_text(text) or (copy := json.loads(text)) != value:
        raise bad(name, value, allowed)
    return copy


def _is_text(value):
    """It can be told in UTF-8, and has no NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value

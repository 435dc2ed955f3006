"""A JSON schema -> a regular expression of JSON texts that are valid under it: exact, or refused by name.

outlines-core writes the frame of objects, arrays and plain values. It ignores keywords that it does not know and gets
others wrong, so it is shown one level at a time, where every part is a marker that our own expression replaces.
"""

import json
import math
import re
from fractions import Fraction
from itertools import combinations
from urllib.parse import unquote

from .patterns import MAX_COUNT, string_pattern
from .ranges import decimals

MAX_CHARS = 200_000  # of the regular expressions of a schema and of all its parts
MAX_PROPERTIES = 256  # of an object, or schemas of oneOf: what is done grows with their square
MAX_INTEGER, MAX_NUMBER = 2**64, 10**9  # ends of ranges
PLACES = 6  # behind the point of a number with a range: up to MAX_NUMBER that is 15 digits, which a float tells apart

_ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$comment", "$defs", "definitions",
}  # fmt: skip
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_MARKER = '"@([0-9]+)@"'
_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OWN = {  # keywords of a type; without "type" a keyword speaks of the last that has it
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _RANGE,
    "number": _RANGE,
    "boolean": (),
    "null": (),
}
_KNOWN = {"type", *_COMBINED, *(word for words in _OWN.values() for word in words)}

_TIME, _LABEL = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]", "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DATE, _ZONE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])", r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {  # the library's have texts that are no JSON
    "date": _DATE,
    "time": rf"{_TIME}(?:\.[0-9]{{1,6}})?{_ZONE}",
    "date-time": rf"{_DATE}T{_TIME}(?:\.[0-9]{{1,6}})?{_ZONE}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_LABEL}\.)+[A-Za-z]{{2,}}",
    "uri": rf"https?://{_LABEL}(?:\.{_LABEL})*(?::[1-9][0-9]{{0,3}})?(?:/[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?",
}


def json_regex(schema: dict) -> str:
    """The regular expression of JSON texts that are valid under a schema.

    schema: of JSON Schema, draft 2020-12. Texts may be fewer than it allows:
        objects have the properties that are listed, in that order, and no others, unless none are listed;
        arrays with prefixItems end behind them;
        where anything is allowed, it nests two levels;
        at most one space stands between tokens;
        a pattern speaks of the whole string, and neither it nor a format yields what JSON has to escape or C1 controls;
        \\d, \\w, \\s and their opposites are of printable ASCII;
        a format is the shape, say of a date, not the calendar; uri is http(s);
        numbers with a range have no exponent and at most six places behind the point;
        keywords of one type without "type" speak of values of that type (ranges: of numbers).
    Returns it in the syntax of Rust's regex crate; it has to match the whole text.
    Raises ValueError for what is no schema, for what cannot be expressed, naming the keyword and where it stands as a
    JSON pointer, and where nothing would be valid; ModuleNotFoundError without outlines-core.
    """
    try:
        root = _parsed(schema)
        return _Reader(root).regex(root, "#")
    except RecursionError:
        raise ValueError("json_schema: nested too deep, expected less than some hundred levels") from None


def _parsed(schema):
    """A schema as JSON can say it, which is a copy."""
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()  # not of lone surrogates
        copy = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema: {error}; expected a JSON object") from None
    if not isinstance(schema, dict) or copy != schema:
        raise ValueError("json_schema: expected a JSON object, with strings as keys and lists as arrays")
    return copy


def _bad(at, word, why):
    return ValueError(f'json_schema: "{word}" at {at}: {why}')


class _Reader:
    """Reads the parts of one schema. Methods return expressions that can be repeated or stand beside others.

    at: the JSON pointer of a part, for errors.
    refs: the $refs that have led to it.
    """

    def __init__(self, root):
        self.root, self.chars = root, 0

    def regex(self, schema, at, refs=()):
        found = self._regex(schema, at, refs)
        self.chars += len(found)  # of all levels: what $refs repeat is small at the lowest
        _check_size(self.chars)
        return found

    def _regex(self, schema, at, refs):
        if schema is False:
            raise ValueError(f"json_schema: false at {at}: nothing is valid under it")
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema: {schema!r:.80} at {at}: expected a schema, an object or true")
        words = [word for word in schema if word not in _ANNOTATIONS]
        for word in words:
            if word not in _KNOWN:
                raise _bad(at, word, f"not supported, expected one of {', '.join(sorted(_KNOWN))}")
        if "$id" in schema and schema is not self.root:
            raise _bad(at, "$id", "expected it at the root only")
        if not words:
            return _library({})
        for kind in _COMBINED:
            if kind in words:
                for word in words:
                    if word != kind and not (word == "type" and kind in ("enum", "const")):
                        raise _bad(at, word, f'expected it not beside "{kind}"')
                return self._combined(kind, schema, at, refs)
        types = _types(schema, at) if "type" in schema else [[name for name in _OWN if words[0] in _OWN[name]][-1]]
        for word in words:
            if word != "type" and not any(word in _OWN[name] for name in types):
                raise _bad(at, word, f"has no effect on {' or '.join(types)}, expected it at its own type only")
        return _either([getattr(self, f"_{name}", _plain)(schema, at, refs, name) for name in types])

    def _combined(self, kind, schema, at, refs):
        if kind == "$ref":
            ref = schema["$ref"]
            target = self._target(schema, at)
            if ref in refs:
                raise _bad(at, "$ref", f"{ref!r:.80} is recursive, expected an end")
            return self.regex(target, ref, (*refs, ref))
        if kind in ("enum", "const"):
            return _either(map(_literal, _values(schema, at)))
        several = _list(schema, at, kind)
        if kind == "allOf" and len(several) > 1:
            raise _bad(at, "allOf", f"{len(several)} schemas, expected one")
        parts = [self.regex(one, f"{at}/{kind}/{i}", refs) for i, one in enumerate(several)]
        if kind == "oneOf" and len(several) > MAX_PROPERTIES:
            raise _bad(at, "oneOf", f"{len(several)} schemas, expected at most {MAX_PROPERTIES}, or anyOf")
        for (i, one), (j, other) in combinations(enumerate(several), 2):
            if kind == "oneOf" and not self._disjoint(one, other, at):
                raise _bad(at, "oneOf", f"{i} and {j} may overlap, expected other types or values, or anyOf")
        return _either(parts)

    def _target(self, schema, at):
        """The schema that "$ref" points to."""
        ref = schema["$ref"]
        if not isinstance(ref, str) or not re.match("#(/|$)", ref):
            raise _bad(at, "$ref", f"{ref!r:.80}: expected # or #/... within the schema")
        node = self.root
        for key in unquote(ref).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and re.fullmatch("[0-9]{1,9}", key) and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node and ("$id" not in node or node is self.root):
                node = node[key]
            else:
                raise _bad(at, "$ref", f"{ref!r:.80}: nothing is there, expected the place of a schema")
        return node

    def _disjoint(self, one, other, at):
        """Whether certainly nothing is valid under both of two schemas, which have been read before."""
        while isinstance(one, dict) and "$ref" in one:
            one = self._target(one, at)
        if isinstance(other, dict) and "$ref" in other:
            return self._disjoint(other, one, at)
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return False
        values, others = _values(one, at), _values(other, at)
        if values is not None and others is not None:
            return not any(a == b and isinstance(a, bool) == isinstance(b, bool) for a in values for b in others)
        kinds, more = ({"number" if t == "integer" else t for t in _types(s, at)} for s in (one, other))
        if kinds != {"object"} or more != {"object"}:
            return bool(kinds) and bool(more) and not kinds & more
        tags = set(one.get("required", ())) & set(other.get("required", ()))
        return any(self._disjoint(one["properties"][tag], other["properties"][tag], at) for tag in tags)

    def _object(self, schema, at, refs, name):
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or len(properties) > MAX_PROPERTIES:
            raise _bad(at, "properties", f"{properties!r:.80}: expected an object, at most {MAX_PROPERTIES} names")
        if not isinstance(required, list) or not all(isinstance(key, str) and key in properties for key in required):
            raise _bad(at, "required", f"{required!r:.80}: expected a list of names among the properties")
        if not isinstance(others, (bool, dict)):
            raise _bad(at, "additionalProperties", f"{others!r:.80}: expected a schema")
        free = others is True or isinstance(others, dict) and not others.keys() - _ANNOTATIONS
        if not properties and free:
            return _library({"type": "object"})
        if not properties and others is not False:
            part = self.regex(others, f"{at}/additionalProperties", refs)
            return _library({"type": "object", "additionalProperties": {"const": _marker(0)}}, [part])
        if not free and others is not False:
            raise _bad(at, "additionalProperties", "a schema beside properties, expected false or nothing")
        parts, marks, frame = [], {}, {}
        for i, (key, one) in enumerate(properties.items()):
            marks[key] = _marker(2 * i)
            frame[marks[key]] = {"const": _marker(2 * i + 1)}
            where = key.replace("~", "~0").replace("/", "~1")
            parts += [_literal(key), self.regex(one, f"{at}/properties/{where}", refs)]
        return _library({"type": "object", "properties": frame, "required": [marks[key] for key in required]}, parts)

    def _array(self, schema, at, refs, name):
        low, high = _counts(schema, at, "minItems", "maxItems")
        items = schema.get("items", True)
        if "prefixItems" in schema:
            prefix = _list(schema, at, "prefixItems")
            if not isinstance(items, bool):
                raise _bad(at, "items", "a schema beside prefixItems, expected false or nothing")
            if not low <= len(prefix) <= high:
                raise _bad(at, "prefixItems", f"{len(prefix)} items, expected as many as minItems and maxItems allow")
            parts = [self.regex(one, f"{at}/prefixItems/{i}", refs) for i, one in enumerate(prefix)]
            return _library({"type": "array", "prefixItems": [{"const": _marker(i)} for i in range(len(parts))]}, parts)
        if items is False and low:
            raise _bad(at, "items", f"false beside minItems={low}: nothing is valid under it")
        counts = {word: schema[word] for word in ("minItems", "maxItems") if word in schema}
        if items is True and not counts:
            return _library({"type": "array"})
        if items is False or high == 0:
            return _literal([])
        part = self.regex(items, f"{at}/items", refs)
        return _library({"type": "array", "items": {"const": _marker(0)}, **counts}, [part])

    def _string(self, schema, at, refs, name):
        _counts(schema, at, "minLength", "maxLength")
        lengths = {word: schema[word] for word in ("minLength", "maxLength") if word in schema}
        given = [word for word in ("pattern", "format") if word in schema] + [*lengths][:1]
        if len(given) > 1:
            raise _bad(at, given[0], f'expected it not beside "{given[1]}"')
        if "pattern" in schema:
            try:
                return string_pattern(schema["pattern"])
            except ValueError as error:
                raise _bad(at, "pattern", f"{schema['pattern']!r:.80}: {error}") from None
        if "format" in schema:
            shape = schema["format"]
            if not isinstance(shape, str) or shape not in _FORMATS:
                raise _bad(at, "format", f"{shape!r:.80}: expected one of {', '.join(_FORMATS)}")
            return f'"{_FORMATS[shape]}"'
        return _library({"type": "string", **lengths})

    def _integer(self, schema, at, refs, name):
        if not any(word in schema for word in _RANGE):
            return _plain(schema, at, refs, name)
        limit, places = (MAX_NUMBER, PLACES) if name == "number" else (MAX_INTEGER, 0)
        lows, highs = [], []
        for word in _RANGE:
            if word in schema:
                end = schema[word]
                if isinstance(end, bool) or not isinstance(end, (int, float)) or not -limit <= end <= limit:
                    raise _bad(at, word, f"{end!r:.80}: expected a number in -{limit}..{limit}")
                units = Fraction(repr(end)) * 10**places  # of the decimal: 0.1 is to be within 0.1..1
                if "min" in word.lower():
                    lows.append(math.floor(units) + 1 if "exclusive" in word else math.ceil(units))
                else:
                    highs.append(math.ceil(units) - 1 if "exclusive" in word else math.floor(units))
        low, high = max(lows, default=None), min(highs, default=None)
        if lows and highs and low > high:
            given = ", ".join(f"{word}={schema[word]}" for word in _RANGE if word in schema)
            raise _bad(at, name, f"{given}: nothing is valid under it")
        return decimals(low, high, places)

    _number = _integer


def _plain(schema, at, refs, name):
    return _library({"type": name})


def _library(schema, parts=()):
    """outlines-core's expression of a schema, in which the string _marker(i) stands for parts[i]."""
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: json_schema needs pip install "llada2-fast[structured]"') from error
    frame = build_regex_from_schema(json.dumps(schema))
    _check_size(len(frame) + sum(len(parts[int(i)]) for i in re.findall(_MARKER, frame)))
    return _either([re.sub(_MARKER, lambda marker: parts[int(marker[1])], frame)])


def _check_size(chars):
    if chars > MAX_CHARS:
        raise ValueError(f"json_schema: more than {MAX_CHARS} characters as a regular expression, expected fewer")


def _marker(i):
    return f"@{i}@"


def _either(parts):
    return f"(?:{'|'.join(parts)})"


def _literal(value):
    if isinstance(value, list):
        return rf"\[ ?{', ?'.join(map(_literal, value))} ?\]" if value else r"\[ ?\]"
    if isinstance(value, dict):
        pairs = ", ?".join(f"{_literal(key)}: ?{_literal(one)}" for key, one in value.items())
        return rf"\{{ ?{pairs} ?\}}" if value else r"\{ ?\}"
    return re.escape(json.dumps(value, ensure_ascii=False))


def _list(schema, at, word):
    if not isinstance(schema[word], list) or not schema[word]:
        raise _bad(at, word, f"{schema[word]!r:.80}: expected a list that is not empty")
    return schema[word]


def _types(schema, at):
    """The names of the types that a schema says its values have; none if it says nothing."""
    if "type" not in schema:
        return sorted({_type(value) for value in _values(schema, at) or ()})
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or any(name not in list(_OWN) for name in types):
        raise _bad(at, "type", f"{schema['type']!r:.80}: expected of {', '.join(_OWN)}")
    return types


def _type(value):
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {dict: "object", list: "array", str: "string", int: "integer", bool: "boolean", type(None): "null"}
    return names[type(value)]


def _values(schema, at):
    """What "const" or "enum" allow, None without them."""
    if "const" not in schema and "enum" not in schema:
        return None
    values = [schema["const"]] if "const" in schema else _list(schema, at, "enum")
    if "type" in schema:
        types = _types(schema, at)
        for value in values:
            if _type(value) not in types and not (_type(value) == "integer" and "number" in types):
                raise _bad(at, "type", f"{value!r:.80} has another, expected values of {' or '.join(types)}")
    return values


def _counts(schema, at, least, most):
    low, high = schema.get(least, 0), schema.get(most, MAX_COUNT)
    for word, count in (least, low), (most, high):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
            raise _bad(at, word, f"{count!r:.80}: expected an integer in 0..{MAX_COUNT}")
    if low > high:
        raise _bad(at, least, f"{low} and {most}={high}: nothing is valid under it")
    return low, high

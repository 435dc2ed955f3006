"""Every text of the expression of a schema parses and is valid; what cannot be expressed is refused by name."""

import json
import random
import re
import tracemalloc
from collections import deque
from fractions import Fraction
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.schemas import SCHEMAS
from llada2_fast.structured.compiler import byte_dfa
from llada2_fast.structured.ranges import decimals
from llada2_fast.structured.schema import json_regex

pytest.importorskip("outlines_core")
jsonschema = pytest.importorskip("jsonschema")


class Language:
    """The texts of an expression, by its automaton over bytes."""

    def __init__(self, regex):
        dfa = byte_dfa(regex, 100_000)
        self.after = [{byte: row[byte] for byte in range(256) if row[byte] >= 0} for row in dfa.after.tolist()]
        self.start = dfa.start
        before = {}
        for state, successors in enumerate(self.after):
            for successor in successors.values():
                before.setdefault(successor, set()).add(state)
        ends = dfa.accepts.nonzero()[0].tolist()
        self.distance, queue = dict.fromkeys(ends, 0), deque(ends)
        while queue:
            state = queue.popleft()
            for one in before.get(state, ()):
                if one not in self.distance:
                    self.distance[one] = self.distance[state] + 1
                    queue.append(one)

    def matches(self, text):
        state = self.start
        for byte in text.encode():
            state = self.after[state].get(byte)
            if state is None:
                return False
        return self.distance[state] == 0

    def sample(self, rng, length):
        """A random text, which goes the shortest way to an end once it has so many bytes."""
        text, state = bytearray(), self.start
        while True:
            ways = {}  # by the state behind: else nearly all walks would write strings of odd bytes
            for byte, successor in self.after[state].items():
                ways.setdefault(successor, []).append(byte)
            if self.distance[state] == 0 and (not ways or len(text) >= length or rng.random() < 0.2):
                return text.decode()
            if len(text) >= length:
                nearest = min(self.distance[successor] for successor in ways)
                ways = {successor: ways[successor] for successor in ways if self.distance[successor] == nearest}
            state = rng.choice(list(ways))
            text.append(rng.choice(ways[state]))


@lru_cache(None)
def language(name):
    return Language(json_regex(SCHEMAS[name]))


def check_samples(schema, texts, seed=0, count=150):
    validator = jsonschema.Draft202012Validator(schema)
    rng = random.Random(seed)
    for _ in range(count):
        text = texts.sample(rng, rng.randrange(60))
        try:
            validator.validate(json.loads(text))
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"{text!r}: {error}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_is_valid(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    check_samples(SCHEMAS[name], language(name))


# Of each schema: values of which json.dumps is in the language, and texts that are not.
VALUES = {
    "person": ([{"name": "Ada", "age": 36}, {"name": "", "age": 120}], ['{"name": "Ada", "age": 121}']),
    "titles": ([{"x": -12, "y": 99}], ['{"y": 1, "x": 1}', '{"x": 1}']),
    "nested": ([{"a": {"b": {"c": True}}}], ["{}"]),
    "optional last": ([{"id": 1}, {"id": 0, "note": "x"}], ['{"note": "x"}']),
    "optional first": ([{"id": 1}, {"note": "x", "id": 0}], ['{"note": "x",}']),
    "all optional": ([{}, {"a": 1}, {"b": None}, {"a": 1, "c": False}], ['{"a": 1,}', '{,"a": 1}']),
    "closed": ([{"ok": True}], ['{"ok": true, "more": 1}']),
    "empty object": ([{}], ['{"a": 1}']),
    "map": ([{}, {"a": 1, "b c": 20}], ['{"a": -1}', '{"a": null}']),
    "map of lists": ([{}, {"a": [], "b": [True, False]}], ['{"a": [1]}']),
    "list": ([[], [1], [1, 22, 3]], ["[100]", "[1,]"]),
    "list of two to four": ([[1, -2], [1, 2, 3, 4]], ["[1]", "[1, 2, 3, 4, 5]"]),
    "list of at least one": ([["a"], ["b", "a", "a"]], ["[]"]),
    "list of at most one": ([[], [None]], ["[null, null]"]),
    "empty list": ([[]], ["[1]"]),
    "matrix": ([[], [[1, 2], [3, 4]]], ["[[1]]"]),
    "list of objects": ([[{"k": "v"}], [{"k": "v"}, {"k": "w"}]], ["[]"]),
    "tuple": ([["a", 1, True]], ['["a", 1]']),
    "closed tuple": ([[1]], ["[1, 2]", "[]"]),
    "enum": (["red", "blue"], ['"black"', "red"]),
    "mixed enum": ([1, 2.5, "two words", None, True, [1, "x"], {"a b": {"c": []}}], ["2", "false", '["x", 1]']),
    "integer enum": ([-1, 0, 10], ["1"]),
    "const": ([{"version": 2, "kind": 'a "b"\\\n(c)*'}], ['{"version": 1, "kind": "a"}']),
    "boolean": ([True, False], ["null"]),
    "null": ([None], ["0"]),
    "integer": ([0, -5, 123456], ["1.5", "01"]),
    "number": ([0, -5, 1.25, 1e-07], ["1.", ".5"]),
    "integer range": ([7, 9, 10, 99, 100, 999, 1000, 1234], ["6", "1235", "0007", "-7"]),
    "integer around zero": ([-15, -9, -1, 0, 8], ["-16", "9", "-0"]),
    "negative integer": ([-1, -10, -999999], ["0", "1"]),
    "integer from": ([18, 19, 20, 99, 100, 12345], ["17", "9", "-18"]),
    "integer exclusive": ([-2, 0, 1, 2], ["-3", "3"]),
    "probability": ([0, 1, 0.5, 0.123456, 1.0, 0.0], ["1.1", "-0.1", "2", "1.000001"]),
    "positive": ([1, 0.0001, 12.5, 1234], ["0", "0.0", "-1"]),
    "temperature": ([-273.15, -273, 36.6, 36, 0, -0.5, 9.75, 20.25], ["36.7", "-273.16", "-274", "37"]),
    "number below": ([-0.6, -1, -0.500001, -22], ["-0.5", "0", "1"]),
    "small number": ([0.2, 0.11, 0.100001, 0.249999], ["0.1", "0.25", "0.3", "0"]),
    "string": (["", "a b", 'say "hi"', "é\n😀\\"], ["a", '"a']),
    "short string": (["ab", "é\n😀", "abcde"], ['"a"', '"abcdef"']),
    "long string": (["abc", "abcdefgh"], ['"ab"']),
    "code": (["AB-123"], ['"AB-12"', '"AB-1234"']),
    "alternatives": (["cat", "dogs", "fish"], ['"fishs"', '"cats dog"']),
    "word": (["one", "one two_3"], ['"one  two"', '" one"']),
    "not comma": (["a b.12", "?.00"], ['"a,b.12"', '"a1.12"']),
    "date": (["2024-02-29"], ['"2024-13-01"', '"٢٠٢٤-01-01"']),
    "time": (["23:59:59Z", "01:02:03.5+02:00"], ['"24:00:00Z"', '"01:02:03\\xZ"']),
    "date-time": (["2024-01-31T12:00:00Z", "2024-01-31T12:00:00.123-05:30"], ['"2024-01-31"']),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ['"123e4567"']),
    "email": (["ada.l@example.org"], ['"ada@"', '"""@example.org"']),
    "uri": (["https://example.org:8080/a/b?c=d", "http://localhost"], ['"example.org"', '"https://a/"b"']),
    "nullable": ([{"n": None}, {"n": 12}], ['{"n": 13}', '{"n": 0}']),
    "nullable string": ([None, "abcd"], ['"abcde"']),
    "nullable by anyOf": ([{"n": None}, {"n": 5}], ['{"n": "x"}']),
    "oneOf types": ([5, "x", [1, 2]], ["null"]),
    "oneOf values": ([True, 1, 2], ["false", "1.0"]),
    "reference": ([{"from": {"x": 1}, "to": {"x": 2}}], ['{"from": {"x": 1}}']),
    "tagged union": ([{"kind": "cat", "lives": 9}, {"kind": "dog", "good": True}], ['{"kind": "cat", "good": true}']),
    "allOf of one": ([{"size": "M"}], ['{"size": "XL"}']),
    "unicode": ([{"größe": "groß", "名前": "さくら"}], ['{"größe": "groß", "名前": "abc"}']),
    "odd keys": ([{'a"b': None, "c\\d": None, "e.f*": 1, "@1@": 2, "": "x"}], []),
    "without type": ([{"a": "x"}], ['{"a": ""}', "{}"]),
    "any object": ([{}, {"a": 1, "b": [True, "x"], "c": {"d": None}}], ["[]"]),
    "anything in a list": ([[], [1], [{"a": None}, "x"]], ["[1, 2, 3]"]),
    "open": ([{"a": None}], ['{"a": null, "b": 1}']),
    "eleven fields": (
        [{"f10": True}, {"f0": True, "f9": False, "f10": True}],
        ['{"f0": true}', '{"f10": true, "f2": true}'],
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_plausible_answers_match(name):
    values, others = VALUES[name]
    for value in values:
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(value)
        assert language(name).matches(json.dumps(value, ensure_ascii=False)), value
        assert language(name).matches(json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value
    for text in others:
        assert not language(name).matches(text), text


# (schema, keyword, where, of the message)
REFUSED = [
    ({"type": "integer", "multipleOf": 2}, "multipleOf", "#"),
    (
        {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}},
        "uniqueItems",
        "#/properties/tags",
    ),
    ({"type": "object", "properties": {"a/b~": {"not": {}}}}, "not", "#/properties/a~1b~0"),
    ({"type": "object", "minProperties": 1}, "minProperties", "#"),
    ({"type": "object", "patternProperties": {}}, "patternProperties", "#"),
    ({"type": "array", "contains": {}}, "contains", "#"),
    ({"if": {}, "then": {}}, "if", "#"),
    ({"tpye": "string"}, "tpye", "#"),
    ({"type": "text"}, "type", "#"),
    ({"type": []}, "type", "#"),
    ({"type": [["string"]]}, "type", "#"),
    ({"type": "integer", "maxLength": 3}, "maxLength", "#"),
    ({"type": ["null", "boolean"], "minimum": 3}, "minimum", "#"),
    ({"minLength": 1, "minimum": 1}, "minimum", "#"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern", "#"),
    ({"type": "string", "format": "date", "minLength": 3}, "format", "#"),
    ({"type": "string", "format": "hostname"}, "format", "#"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength", "#"),
    ({"type": "string", "minLength": -1}, "minLength", "#"),
    ({"type": "string", "maxLength": True}, "maxLength", "#"),
    ({"type": "string", "maxLength": 10**9}, "maxLength", "#"),
    *(
        ({"type": "string", "pattern": pattern}, "pattern", "#")
        for pattern in (
            '"',
            r"\\",
            r"\n",
            "\n",
            r"\x00",
            r"\u0022",
            '["]',
            r"[\n\t]",
            "(?=a)a",
            "(?!a)b",
            "(?<=a)b",
            r"(a)\1",
            r"\bab",
            "a^b",
            "a$b",
            "(a$)+",
            "(?i)a",
            "(?i:a)",
            r"\p{L}",
            "(",
            "[b-a]",
            "a{20000}",
            "\ud7ff[\\ud800-\\udfff]",
            3,
            None,
        )
    ),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "integer", "#"),
    ({"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 5}, "integer", "#"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7}, "number", "#"),
    ({"type": "number", "minimum": 1e12}, "minimum", "#"),
    ({"type": "integer", "minimum": "1"}, "minimum", "#"),
    ({"type": "number", "minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum", "#"),
    ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems", "#"),
    ({"type": "array", "items": False, "minItems": 1}, "items", "#"),
    ({"type": "array", "prefixItems": [{}], "minItems": 2}, "prefixItems", "#"),
    ({"type": "array", "prefixItems": [{}, {}], "maxItems": 1}, "prefixItems", "#"),
    ({"type": "array", "prefixItems": [{}], "items": {"type": "null"}}, "items", "#"),
    ({"type": "array", "prefixItems": []}, "prefixItems", "#"),
    ({"type": "object", "required": ["a"]}, "required", "#"),
    ({"type": "object", "properties": {"a": {}}, "required": "a"}, "required", "#"),
    ({"type": "object", "properties": {"a": {}}, "required": [["a"]]}, "required", "#"),
    ({"type": "object", "properties": ["a"]}, "properties", "#"),
    ({"type": "object", "properties": {f"p{i}": {} for i in range(300)}}, "properties", "#"),
    (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}},
        "additionalProperties",
        "#",
    ),
    ({"type": "object", "additionalProperties": 1}, "additionalProperties", "#"),
    ({"enum": []}, "enum", "#"),
    ({"enum": "ab"}, "enum", "#"),
    ({"type": "string", "enum": ["a", 1]}, "type", "#"),
    ({"type": "integer", "const": True}, "type", "#"),
    ({"type": "integer", "const": 1.5}, "type", "#"),
    ({"type": "string", "enum": ["a"], "maxLength": 3}, "maxLength", "#"),
    ({"type": "object", "anyOf": [{"type": "object"}]}, "type", "#"),
    ({"anyOf": [{"type": "null"}], "oneOf": [{"type": "null"}]}, "oneOf", "#"),
    ({"anyOf": []}, "anyOf", "#"),
    ({"allOf": [{"type": "null"}, {"type": "null"}]}, "allOf", "#"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", "#"),
    ({"oneOf": [{"enum": [1, 2]}, {"enum": [2.0, 3]}]}, "oneOf", "#"),
    ({"oneOf": [{"minLength": 2}, {"type": "integer"}]}, "oneOf", "#"),
    ({"oneOf": [{"type": "object", "properties": {"a": {"const": i}}} for i in range(2)]}, "oneOf", "#"),
    ({"oneOf": [True, {"type": "null"}]}, "oneOf", "#"),
    ({"$ref": "#"}, "$ref", "#"),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}}, "$ref", "#/properties/next"),
    ({"$ref": "other.json"}, "$ref", "#"),
    ({"$ref": "#anchor"}, "$ref", "#"),
    ({"$ref": "#/$defs/none"}, "$ref", "#"),
    ({"$ref": 1}, "$ref", "#"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "$ref", "#/$defs/b"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}, "type": "null"}, "type", "#"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$id": "urn:a", "type": "null"}}}, "$id", "#/$defs/a"),
]


@pytest.mark.parametrize("schema, word, where", REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_refused_by_name(schema, word, where):
    with pytest.raises(ValueError, match=re.escape(f'json_schema: "{word}" at {where}: ')):
        json_regex(schema)


def doubled(depth):
    """A short schema whose references are 2**depth places."""
    levels = {f"l{i}": {"anyOf": [{"$ref": f"#/$defs/l{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/l0", "$defs": {**levels, f"l{depth}": {"type": "null"}}}


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "array", "items": {"anyOf": [False]}}, "false at #/items/anyOf/0: nothing"),
        ({"type": "array", "items": [{}]}, r"\[\{\}\] at #/items: expected a schema"),
        (True, "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ({"const": float("nan")}, "not JSON compliant"),
        ({"enum": [float("inf")]}, "not JSON compliant"),
        ({"const": {1, 2}}, "not JSON serializable"),
        ({"const": "\ud800"}, "surrogates not allowed"),
        ({"const": {1: 2}}, "strings as keys"),
        ({"enum": (1, 2)}, "lists as arrays"),
        (nested(100), "nested too deep|more than 200000 characters"),
        (nested(5000), "nested too deep"),
        (doubled(40), "more than 200000 characters"),
        ({"enum": [str(i) * 9 for i in range(10000)]}, "more than 200000 characters"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(type(value)),
)
def test_refused_as_a_whole(schema, message):
    with pytest.raises(ValueError, match=f"^json_schema.*({message})"):
        json_regex(schema)


def test_the_size_is_known_before_the_memory_is_taken():
    """256 optional properties repeat the first as often."""
    properties = {"a": {"const": "a" * 10**5}, **{f"p{i}": {"type": "null"} for i in range(255)}}
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 200000 characters"):
        json_regex({"type": "object", "properties": properties})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15e6


# Schemas at random, of which some are refused.
_values = st.one_of(st.none(), st.booleans(), st.integers(-20, 20), st.floats(-9, 9), st.text(max_size=4))
_ends = st.one_of(
    st.integers(-1200, 1200), st.decimals(-20, 20, places=3).map(float), st.sampled_from([1e-5, 0.3, 1e8])
)
_patterns = st.sampled_from(
    [
        r"a|b",
        r"^\d+$",
        r"^[^a]{1,2}",
        r"\S\W*",
        r"[\s\-\]&~^[]+",
        r"(x|yz)?\.",
        r".{2}",
        r"[^\w]",
        r"[ -~]+",
        r"\w[^\d\s]",
        r"é|[à-ÿ]",
    ]
)
_leaves = st.one_of(
    st.sampled_from(
        [{"type": "string"}, {"type": ["null", "boolean"]}, {"type": "number"}, {"type": "string", "format": "date"}]
    ),
    st.builds(lambda values: {"enum": values}, st.lists(_values, min_size=1, max_size=3)),
    st.builds(lambda value: {"const": value}, st.dictionaries(st.text(max_size=3), _values, max_size=2)),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, _patterns),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.builds(
        lambda name, ends: {"type": name, **ends},
        st.sampled_from(["integer", "number"]),
        st.dictionaries(
            st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), _ends, max_size=2
        ),
    ),
)


def _arrays(schemas):
    counts = st.dictionaries(st.sampled_from(["minItems", "maxItems"]), st.integers(0, 3), max_size=2)
    return st.builds(lambda items, counts: {"type": "array", "items": items, **counts}, schemas, counts)


def _objects(schemas):
    properties = st.dictionaries(st.text(max_size=4), schemas, max_size=4)
    return st.builds(
        lambda properties, n: {"type": "object", "properties": properties, "required": list(properties)[:n]},
        properties,
        st.integers(0, 4),
    )


_schemas = st.recursive(
    _leaves,
    lambda schemas: st.one_of(
        _arrays(schemas),
        _objects(schemas),
        st.builds(lambda one: {"type": "object", "additionalProperties": one}, schemas),
        st.builds(lambda some: {"type": "array", "prefixItems": some}, st.lists(schemas, min_size=1, max_size=3)),
        st.builds(
            lambda kind, some: {kind: some},
            st.sampled_from(["anyOf", "oneOf"]),
            st.lists(schemas, min_size=1, max_size=3),
        ),
    ),
    max_leaves=6,
)


def check_refused_or_right(schema, seed):
    try:
        regex = json_regex(schema)
    except ValueError as error:
        assert str(error).startswith("json_schema: "), error
        return
    check_samples(schema, Language(regex), seed, 30)


@settings(max_examples=150, deadline=None)
@given(_schemas, st.integers(0, 2**32))
def test_random_schemas(schema, seed):
    check_refused_or_right(schema, seed)


_words = st.sampled_from(
    """type $ref anyOf oneOf allOf enum const properties required additionalProperties items prefixItems minItems
    maxItems minLength maxLength pattern
    format minimum maximum exclusiveMinimum exclusiveMaximum title $defs not""".split()
)
_types = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"])
_soup = st.recursive(
    st.one_of(_values, _types, st.sampled_from(["#", "#/$defs/a", "date", "a|b", "a"])),
    lambda some: st.one_of(
        st.lists(some, max_size=2),
        st.dictionaries(_words, some, max_size=2),
        st.dictionaries(st.sampled_from("ab"), some, max_size=2),
        st.builds(lambda kind, more: {"type": kind, **more}, _types, st.dictionaries(_words, some, max_size=2)),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.dictionaries(_words, _soup, max_size=3), _soup), st.integers(0, 2**32))
def test_anything_is_refused_or_right(schema, seed):
    check_refused_or_right(schema, seed)


@settings(max_examples=100, deadline=None)
@given(st.integers(-2000, 2000), st.integers(0, 3000), st.integers(0, 3))
def test_ranges_are_exact(low, more, places):
    """Every decimal near a range is in the language if and only if it is in the range."""
    unit = 10**places
    numbers = re.compile(decimals(low, low + more, places))
    for n in {*range(low - 25, low + 25), *range(low + more - 25, low + more + 25), *range(-25, 25)}:
        for text in {str(n // unit), f"{n // unit}.{n % unit:0{places}}"} if n >= 0 and places else {str(n)}:
            value = Fraction(text) * unit
            assert bool(numbers.fullmatch(text)) == (low <= value <= low + more), text
        assert not numbers.fullmatch(f"{n // unit}.")
    for text in ("-0", "00", "01", ".5", f"0.{'0' * (places + 1)}"):
        assert not numbers.fullmatch(text)

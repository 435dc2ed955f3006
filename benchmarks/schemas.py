"""Schemas of kinds that people use. The shortest answer to most is short."""


def _object(properties, required=None, **more):
    return {"type": "object", "properties": properties, "required": list(required or properties), **more}


_STRING, _INTEGER = {"type": "string", "maxLength": 8}, {"type": "integer", "minimum": 0, "maximum": 99}

SCHEMAS = {
    "person": _object({"name": _STRING, "age": {"type": "integer", "minimum": 0, "maximum": 120}}),
    "titles": {"title": "Point", **_object({"x": {"type": "integer", "title": "X", "default": 0}, "y": _INTEGER})},
    "nested": _object({"a": _object({"b": _object({"c": {"type": "boolean"}})})}),
    "optional last": _object({"id": _INTEGER, "note": _STRING}, ["id"]),
    "optional first": _object({"note": _STRING, "id": _INTEGER}, ["id"]),
    "all optional": {"type": "object", "properties": {"a": _INTEGER, "b": {"type": "null"}, "c": {"type": "boolean"}}},
    "closed": _object({"ok": {"type": "boolean"}}, additionalProperties=False),
    "open": _object({"a": {"type": "null"}}, additionalProperties={}),
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
    "map of lists": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "boolean"}}},
    "list": {"type": "array", "items": _INTEGER},
    "list of two to four": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "list of at least one": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1},
    "list of at most one": {"type": "array", "items": {"type": "null"}, "maxItems": 1},
    "empty list": {"type": "array", "maxItems": 0},
    "matrix": {"type": "array", "items": {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2}},
    "list of objects": {"type": "array", "items": _object({"k": _STRING}), "minItems": 1, "maxItems": 2},
    "tuple": {"type": "array", "prefixItems": [_STRING, _INTEGER, {"type": "boolean"}]},
    "closed tuple": {"type": "array", "prefixItems": [_INTEGER], "items": False, "minItems": 1, "maxItems": 1},
    "enum": {"type": "string", "enum": ["red", "green", "blue"]},
    "mixed enum": {"enum": [1, 2.5, "two words", None, True, [1, "x"], {"a b": {"c": []}}]},
    "integer enum": {"type": "integer", "enum": [-1, 0, 10]},
    "const": _object({"version": {"const": 2}, "kind": {"const": 'a "b"\\\n(c)*'}}),
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "integer range": {"type": "integer", "minimum": 7, "maximum": 1234},
    "integer around zero": {"type": "integer", "minimum": -15, "maximum": 8},
    "negative integer": {"type": "integer", "exclusiveMaximum": 0},
    "integer from": {"type": "integer", "minimum": 18},
    "integer exclusive": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 2.5},
    "probability": {"type": "number", "minimum": 0, "maximum": 1},
    "positive": {"type": "number", "exclusiveMinimum": 0},
    "temperature": {"type": "number", "minimum": -273.15, "maximum": 36.6},
    "number below": {"type": "number", "exclusiveMaximum": -0.5},
    "small number": {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.25},
    "string": {"type": "string"},
    "short string": {"type": "string", "minLength": 2, "maxLength": 5},
    "long string": {"type": "string", "minLength": 3},
    "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "alternatives": {"type": "string", "pattern": "^(cat|dog)s?$|^fish$"},
    "word": {"type": "string", "pattern": r"\w+(?: \w+)*"},
    "not comma": {"type": "string", "pattern": r"^[^,\d]+\.\d{2}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "uri": {"type": "string", "format": "uri"},
    "nullable": _object({"n": {"type": ["integer", "null"], "minimum": 1, "maximum": 12}}),
    "nullable string": {"type": ["string", "null"], "maxLength": 4},
    "nullable by anyOf": _object({"n": {"anyOf": [_INTEGER, {"type": "null"}], "default": None}}),
    "oneOf types": {"oneOf": [_INTEGER, _STRING, {"type": "array", "items": _INTEGER}]},
    "oneOf values": {"oneOf": [{"const": True}, {"enum": [1, 2]}]},
    "reference": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"point": _object({"x": _INTEGER})},
        **_object({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point", "description": "where"}}),
    },
    "tagged union": {
        "$defs": {
            "cat": _object({"kind": {"const": "cat", "type": "string"}, "lives": _INTEGER}),
            "dog": _object({"kind": {"const": "dog", "type": "string"}, "good": {"type": "boolean"}}),
        },
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    },
    "allOf of one": _object({"size": {"allOf": [{"enum": ["S", "M", "L"]}], "default": "M"}}),
    "unicode": _object(
        {"größe": {"enum": ["klein", "groß"]}, "名前": {"type": "string", "pattern": "^[ぁ-ん一-龯]+$"}}
    ),
    "odd keys": _object(
        {'a"b': {"type": "null"}, "c\\d": {"type": "null"}, "e.f*": _INTEGER, "@1@": _INTEGER, "": _STRING}
    ),
    "without type": {"properties": {"a": {"minLength": 1}}, "required": ["a"]},
    "any object": {"type": "object"},
    "anything in a list": {"type": "array", "items": True, "maxItems": 2},
    "eleven fields": _object({f"f{i}": {"type": "boolean"} for i in range(11)}, ["f10"]),
}

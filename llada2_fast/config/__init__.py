"""Frozen, checked settings: `ModelConfig` (what the network is), `DecodeParams` (how one call decodes), `EngineConfig`,
`RequestOptions`, `ServerConfig`.

Every default of the project lives here. A value that cannot be used is a `ValueError` of the form
``name=value: what is allowed``, raised before any weight is read or any forward is run.
"""

from .checks import (
    DTYPES,
    as_flag,
    as_float,
    as_float32,
    as_ids,
    as_int,
    as_positive32,
    choice,
    find_device,
    parse_json,
)
from .decoding import CHECK_PAGES, ENTROPY_BOUND, PRESETS, PROFILES, SAMPLING_METHODS, DecodeParams
from .engine import EngineConfig, longest, room_for, scratch_pages
from .hf import MODEL_TYPES
from .languages import LANGUAGES, MAX_STATES
from .model import QUANTIZATIONS, ModelConfig
from .request import MAX_LISTED, MAX_SAMPLES, MAX_TOP_LOGPROBS, RequestOptions
from .server import ServerConfig

__all__ = [
    "CHECK_PAGES", "DTYPES", "ENTROPY_BOUND", "LANGUAGES", "MAX_LISTED", "MAX_SAMPLES", "MAX_STATES",
    "MAX_TOP_LOGPROBS", "MODEL_TYPES", "PRESETS", "PROFILES", "QUANTIZATIONS", "SAMPLING_METHODS", "DecodeParams",
    "EngineConfig", "ModelConfig", "RequestOptions", "ServerConfig", "as_flag", "as_float", "as_float32", "as_ids",
    "as_int", "as_positive32", "choice", "find_device", "longest", "parse_json", "room_for",
    "scratch_pages",
]  # fmt: skip

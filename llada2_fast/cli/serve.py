"""llada2-fast serve: an OpenAI-compatible server."""

import argparse
import os
import sys
from dataclasses import fields

from .options import add_model_options, decoding, load_model, model_name, params

KEY = "LLADA2_FAST_API_KEY"
# EngineConfig's fields that have an option, by its name where that is the field's (vLLM's, where vLLM has one).
ENGINE = {
    "max_num_seqs": "max-num-seqs", "max_waiting": "max-queue", "cache_tokens": "cache-tokens",
    "max_num_batched_tokens": "max-num-batched-tokens", "enable_prefix_caching": "enable-prefix-caching",
    "graphs": "graphs", "overlap": "overlap",
}  # fmt: skip
_METAVARS = {int: "N", float: "S", str: "NAME"}


def add_options(parser):
    """The groups "server" and "engine", the fields of ServerConfig and EngineConfig with their defaults and words; and
    those of the model and of decoding, which are for requests that do not say themselves."""
    from ..config import LANGUAGES, EngineConfig, ServerConfig

    add_model_options(parser, without=("model", "gen_length", *LANGUAGES))
    group = parser.add_argument_group("server")
    for one in fields(ServerConfig):
        _add(group, one, one.name.replace("_", "-"))
    group = parser.add_argument_group("engine")
    for one in fields(EngineConfig):
        if one.name in ENGINE:
            _add(group, one, ENGINE[one.name], "on on a GPU" if one.name == "graphs" else None)


def _add(group, one, flag, default=None):
    kind = type(one.default)
    if one.default is None:
        kind = int
    if default is None and one.default not in (None, ()):
        default = {True: "on", False: "off"}.get(one.default, one.default) if kind is bool else one.default
    text = one.metadata["help"] + (f" (default: {default})" if default is not None else "")
    rest = {"type": kind, "metavar": _METAVARS.get(kind)}
    if kind is bool:
        rest = {"action": argparse.BooleanOptionalAction}
    elif kind is tuple:
        rest = {"action": "append", "metavar": "NAME"}
    group.add_argument(f"--{flag}", dest=one.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **rest)


def serve(args):
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    from ..config import EngineConfig, ServerConfig

    asked = decoding(args)
    config = ServerConfig(**_given(args, ServerConfig) | _keys(args))
    engine_options = _given(args, EngineConfig) | {
        name: asked.pop(name) for name in ("block_length", "mask_id") if name in asked
    }
    EngineConfig(**engine_options | {"graphs": False})
    try:
        from ..server import Server, bind
        from ..server import serve as run
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}: serve needs pip install "llada2-fast[serve]"') from error
    from ..engine import AsyncEngine, Engine
    from ..weights.special_tokens import load_tokenizer

    port = bind(config)
    args.progress = args.progress and sys.stderr.isatty()  # else somebody reads lines of JSON there
    model, folder = load_model(args)
    engine_config = EngineConfig(**{"graphs": model.device.type == "cuda", **engine_options})
    engine = Engine(model, engine_config, load_tokenizer(folder))
    names = config.served_model_name or (model_name(args.model),)
    defaults = {name: value for name, value in vars(params(asked)).items() if name in asked or name == "eos_ids"}
    server = Server(AsyncEngine(engine), config, names, defaults)
    try:
        run(server, port)
    finally:
        server.serving.close()
    return 0


def _given(args, config):
    """A config's fields that an option has said."""
    return {one.name: getattr(args, one.name) for one in fields(config) if hasattr(args, one.name)}


def _keys(args):
    given = getattr(args, "api_key", ())
    return {"api_key": (*given, *filter(None, [os.environ.get(KEY)]))}

"""The server's log: a line of JSON for each thing that happened."""

import json
import logging
import sys
import time
import traceback

_logger = logging.getLogger("llada2_fast.server")


def log(event: str, **facts):
    """One thing that has happened."""
    _logger.info(event, extra={"facts": facts})


class Lines(logging.Formatter):
    """Records as lines of JSON: time, level, event, and what else there is to tell."""

    def format(self, record):
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "facts", {}),
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def to_stderr():
    """All logging of this process goes to stderr as such lines, warnings too, and what transformers has to say."""
    from transformers.utils import logging as transformers

    transformers.disable_default_handler()
    transformers.enable_propagation()
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("llada2_fast").setLevel(logging.INFO)

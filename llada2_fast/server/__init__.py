"""An OpenAI-compatible server around an AsyncEngine: `llada2-fast serve`. Needs the extra "serve"."""

from .app import Server
from .log import to_stderr as log_to_stderr
from .run import serve

__all__ = ["Server", "log_to_stderr", "serve"]

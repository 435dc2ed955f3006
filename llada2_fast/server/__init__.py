"""An OpenAI-compatible server around an AsyncEngine: `llada2-fast serve`. Needs the extra "serve"."""

from .app import Server
from .run import bind, serve

__all__ = ["Server", "bind", "serve"]

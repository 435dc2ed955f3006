"""Many requests at once over one model, each with exactly the tokens it would get alone.

`Engine` for programs that step it themselves, `AsyncEngine` for servers.
"""

from .async_engine import AsyncEngine
from .engine import Engine
from .request import Event, QueueFull, Request, RequestOutput

__all__ = ["AsyncEngine", "Engine", "Event", "QueueFull", "Request", "RequestOutput"]

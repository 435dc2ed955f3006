"""Serving stacks call every installed plug-in; one that does not serve their version says so and stands back."""

import logging
import re
from dataclasses import dataclass

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Host:
    """A serving stack. name: as it calls itself; served: the first numbers of the versions served, e.g. "0.33"."""

    name: str
    served: str

    def serves(self, version):
        """version: text. True for the versions served, their pre-releases, patches and builds: 0.33.1rc1+cu129."""
        return re.match(rf"{re.escape(self.served)}(?!\d)", version) is not None

    def refusal(self, version):
        """One sentence that names the versions served and the one found."""
        return f"llada2_fast serves LLaDA2 in {self.name} {self.served}, not in this {self.name}, {version}"

    def stand_back(self, version, error=None):
        """Log the one line that a plug-in says beside another version. error: what looking up a name raised."""
        missed = f" ({type(error).__name__}: {' '.join(str(error).split()):.200})" if error else ""
        _logger.warning("%s%s; the plug-in stands back", self.refusal(version), missed)

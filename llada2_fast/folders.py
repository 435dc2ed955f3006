"""Where the two folders are that live at the repository's root in a checkout and inside this package in a wheel.

`kernels/` and `benchmarks/` have no `__init__.py`: with one, Python started in the repository's root would find them as
top-level packages and hide others of these names, above all Hugging Face's `kernels`, which transformers and diffusers
import. `kernels.py` and `benchmarks.py` beside this file make them importable: llada2_fast.kernels.refine and so on.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def find(name, file):
    """`__path__` of llada2_fast.<name>: the folder as a list of one str. ImportError if it is in neither place.

    file: one of ours in it, for in site-packages the second place may be somebody else's package of that name.
    """
    places = _PACKAGE / name, _PACKAGE.parent / name
    found = [str(place) for place in places if (place / file).is_file()][:1]
    if not found:
        raise ImportError(f"the {name} of llada2_fast are not installed: no {file} in {' or '.join(map(str, places))}")
    return found

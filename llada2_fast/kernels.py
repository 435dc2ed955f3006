"""Makes the folder of kernels importable, one file per op: `from llada2_fast.kernels import refine`.

In a wheel the folder is `llada2_fast/kernels/`, beside this file; in a checkout or an editable install it is `kernels/`
at the repository's root. It has no `__init__.py`: with one, Python started in the repository's root would find it as
the top-level package `kernels` and hide Hugging Face's package of that name, which transformers and diffusers import.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")

# A file of ours is asked for, not the folder alone: in site-packages the second place is Hugging Face's package.
__path__ = [str(place) for place in _PLACES if (place / "refine.py").is_file()][:1]
if not __path__:
    raise ImportError(f"the kernels of llada2_fast are not installed: no refine.py in {' or '.join(map(str, _PLACES))}")

"""The base of what calls return that other libraries have, too: the network and the diffusers-shaped classes."""

from collections import OrderedDict
from dataclasses import fields


class Output(OrderedDict):
    """A dataclass (declare it with eq=False) whose fields are also keys and indices, as diffusers' BaseOutput and
    transformers' ModelOutput.

    Fields that are None have no key and no index. Values can be replaced, fields neither added nor removed.
    """

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key, value):
        setattr(self, key, value)

    def __setattr__(self, name, value):
        names = [field.name for field in fields(self)]
        if name not in names:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}: expected one of {names}")
        super().__setattr__(name, value)
        if name in self:
            super().__setitem__(name, value)

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def to_tuple(self):
        """The fields that are not None, in order."""
        return tuple(self[key] for key in self)

    def _fixed(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__}: fields can neither be added nor removed")

    __delitem__ = pop = popitem = setdefault = update = clear = _fixed

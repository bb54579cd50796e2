"""Training, to who reads the source; a function, to who calls it: `redheart.train(data, out, **settings) -> Run`.

Python gives a package and a name in the package above it one place, so what stands there is both. See `redheart.doors.train`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # the door imports from here; nothing here imports it, it is asked of the public names
        return sys.modules["redheart"]._train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

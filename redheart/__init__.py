"""Red Heart: train a multi-task network for emotion, ethics, regret and causality inside 8 GB of GPU memory.

Importing this package loads nothing heavy. The public names below are imported on first use.
"""

import warnings
from typing import TYPE_CHECKING, Any

from redheart.version import VERSION as __version__

if TYPE_CHECKING:
    from redheart.doors import Evaluated, Prepared, Run, evaluate, prepare, train
    from redheart.infer import RedHeartPipeline
    from redheart.model.redheart import RedHeartModel

__all__ = [
    "Evaluated",
    "Prepared",
    "RedHeartModel",
    "RedHeartPipeline",
    "Run",
    "__version__",
    "evaluate",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # a function and a package, see there
        import redheart.train

        return redheart.train
    if name == "_train" or name in __all__:
        with warnings.catch_warnings():  # of a notebook without widgets, which tqdm misses; progress is lines here
            warnings.filterwarnings("ignore", "IProgress not found")
            if name in ("RedHeartModel", "RedHeartPipeline"):
                from redheart import infer  # it knows runs and checkpoints, which the model alone does not

                return getattr(infer, name)
            from redheart import doors

            return getattr(doors, name.removeprefix("_"))
    raise AttributeError(f"module 'redheart' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

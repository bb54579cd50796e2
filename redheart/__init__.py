"""Red Heart: train a multi-task network for emotion, ethics, regret and causality inside 8 GB of GPU memory.

Importing this package loads nothing heavy. The public names below are imported on first use.
"""

from typing import TYPE_CHECKING, Any

from redheart.version import VERSION as __version__

if TYPE_CHECKING:
    from redheart.infer import RedHeartPipeline
    from redheart.model.redheart import RedHeartModel

__all__ = ["RedHeartModel", "RedHeartPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "RedHeartModel":
        from redheart.model.redheart import RedHeartModel

        return RedHeartModel
    if name == "RedHeartPipeline":
        from redheart.infer import RedHeartPipeline

        return RedHeartPipeline
    raise AttributeError(f"module 'redheart' has no attribute {name!r}")

"""hpcdistill: small image generators distilled from large ones, on one GPU, many GPUs or a cluster.

    import hpcdistill
    from PIL import Image

    model = hpcdistill.load("pretrained:x4")  # or a run folder, a generator's file, an exported one
    model(Image.open("photo.png")).save("photo-x4.png")

The program `hpcdistill` has the commands: `hpcdistill --help`.
"""

import os
from typing import TYPE_CHECKING, Any

from hpcdistill.errors import UserError

if TYPE_CHECKING:
    from hpcdistill.deploy.model import Model, load

# Before torch is imported. A rank whose peers are gone would print C++ frames; `ranks.watchdog` says it better.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Model` are imported when they are asked for: torch takes a second, and most commands do without."""
    if name not in ("Model", "load"):
        raise AttributeError(f"module 'hpcdistill' has no attribute '{name}'")
    from hpcdistill.deploy import model

    return getattr(model, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

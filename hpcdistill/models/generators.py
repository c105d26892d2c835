"""Building an image-to-image generator by the name that a configuration gives it."""

from __future__ import annotations

from typing import Any

from hpcdistill.errors import UserError
from hpcdistill.models import IMAGE_GENERATORS
from hpcdistill.models.image_generator import ImageGenerator


def build_generator(name: str, **arguments: Any) -> ImageGenerator:
    """A new generator; `arguments` are its class's (ngf, channels_in, channels_out; blocks, separable | levels).

    Raises UserError for an unknown name, and for arguments that the class does not take.
    """
    kind = IMAGE_GENERATORS[name]
    try:
        generator: ImageGenerator = kind(**arguments)
    except TypeError as error:
        raise UserError(f"generator '{name}': {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None
    return generator

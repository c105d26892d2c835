"""The image-to-image generators by the name that a configuration gives them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from hpcdistill.errors import UserError, nearest
from hpcdistill.models.image_generator import ImageGenerator
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.models.unet_generator import UNetGenerator

IMAGE_GENERATORS: dict[str, type[ImageGenerator]] = {"resnet": ResNetGenerator, "unet": UNetGenerator}


def _known(name: str) -> str:
    if name not in IMAGE_GENERATORS:
        raise ValueError(f"no generator '{name}'; {nearest(name, IMAGE_GENERATORS)}")
    return name


GeneratorName = Annotated[str, AfterValidator(_known)]  # a configuration's `network`


def build_generator(name: str, **arguments: Any) -> ImageGenerator:
    """A new generator; `arguments` are its class's (ngf, channels_in, channels_out; blocks, separable | levels).

    Raises UserError for an unknown name, and for arguments that the class does not take.
    """
    if name not in IMAGE_GENERATORS:
        raise UserError(f"generator is '{name}'; {nearest(name, IMAGE_GENERATORS)}")
    kind = IMAGE_GENERATORS[name]
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"generator '{name}': {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None

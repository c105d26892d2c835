"""Networks: tensors in, tensors out. A new one is a file here and a line in its registry."""

from typing import Annotated, Final

from pydantic import AfterValidator

from hpcdistill.registry import Registry

# F, the super-resolution networks: subclasses of `sr_network.SRNetwork`.
NETWORKS = Registry(
    "network",
    {
        "fsrcnn": "hpcdistill.models.fsrcnn:FSRCNN",
        "vdsr": "hpcdistill.models.vdsr:VDSR",
        "idn": "hpcdistill.models.idn:IDN",
    },
)
# Image-to-image generators: subclasses of `image_generator.ImageGenerator`.
IMAGE_GENERATORS = Registry(
    "generator",
    {
        "resnet": "hpcdistill.models.resnet_generator:ResNetGenerator",
        "unet": "hpcdistill.models.unet_generator:UNetGenerator",
        "deep_unet": "hpcdistill.models.deep_unet_generator:DeepUNetGenerator",
    },
)
# Every network that is saved as a file of its own, by its class's name. Each has `arguments` (keyword arguments that
# rebuild it) and `takes` ("lr", "hr" or "image").
GENERATORS = Registry(
    "network",
    {
        path.rpartition(":")[2]: path
        for path in (
            *NETWORKS.paths(),
            *IMAGE_GENERATORS.paths(),
            "hpcdistill.models.privileged:PrivilegedTeacher",
            "hpcdistill.models.discriminator:PatchDiscriminator",
        )
    },
)
# What a configuration's `network` may be.
Network = Annotated[str, AfterValidator(NETWORKS.known)]
GeneratorName = Annotated[str, AfterValidator(IMAGE_GENERATORS.known)]

VGG_LAYERS: Final = tuple(f"relu{block}_{layer}" for block in range(1, 6) for layer in range(1, 3 if block < 3 else 4))
PERCEPTUAL: Final = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")  # FESD, section 2.3.2

"""The networks of DSSD and PISR: the teacher with privileged information, and the estimator of its feature map.

The teacher sees the HR image, makes its own LR image of it and enlarges that: Y -> encoder -> X^ -> F -> Y^ ->
degradation -> D^. DSSD's encoder (HFRM) and degradation (SDM) go down in steps of 2, with the same weights at every
step; PISR's encoder goes down at once and has no degradation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.models import NETWORKS
from hpcdistill.models.fsrcnn import conv, conv_prelu
from hpcdistill.models.sr_network import build_network, draw_as_pytorch
from hpcdistill.models.upsampling import Upsampling
from hpcdistill.ops.bicubic import downsample
from hpcdistill.ops.own_backward import scaled_softplus

Encoder = Literal["hfrm", "pisr", "bicubic"]
Degradation = Literal["sdm", "cnn", "bicubic", "none"]

# scale -> strides of the successive levels. The paper is silent on x3; PISR's stride is the scale.
STRIDES = {2: (2,), 3: (3,), 4: (2, 2)}
WIDTH = 56
NARROW = 12

SCALE_FACTOR = 0.1  # of the estimator's b in PISR's code
SMALLEST_SCALE = 1e-8  # keeps ln b and 1/b finite


class HFRM(nn.Module):
    """High-frequency retention module G: `[B, c, H, W]` -> `[B, c, H/stride, W/stride]`, 35,012 parameters with c = 1.

    The SDM has the same structure. Conv 3x3 c-56, 56-56 with the stride, 56-12, each with PReLU, and 12-c, linear.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_prelu(channels, WIDTH, 3),
            conv_prelu(WIDTH, WIDTH, 3, stride),
            conv_prelu(WIDTH, NARROW, 3),
            conv(NARROW, channels, 3),
        )

    def forward(self, image: Tensor) -> Tensor:
        """One level down."""
        smaller: Tensor = self.body(image)
        return smaller


class PISREncoder(nn.Module):
    """PISR's encoder: `[B, c, H, W]` -> `[B, c, H/scale, W/scale]` at once; 86,084 parameters with c = 1."""

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_prelu(channels, WIDTH, 5),
            conv_prelu(WIDTH, WIDTH, 5, scale),
            conv_prelu(WIDTH, NARROW, 3),
            conv(NARROW, channels, 3),
        )

    def forward(self, image: Tensor) -> Tensor:
        """The LR image."""
        smaller: Tensor = self.body(image)
        return smaller


class StridedCNN(nn.Module):
    """The plain down-sampler of table 2: one strided convolution for each of `strides`, nothing shared.

    `[B, c, H, W]` -> `[B, c, H/f, W/f]` with f the product of `strides`.
    """

    def __init__(self, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_prelu(channels, WIDTH, 3),
            *(conv_prelu(WIDTH, WIDTH, 3, stride) for stride in strides),
            conv(WIDTH, channels, 3),
        )

    def forward(self, image: Tensor) -> Tensor:
        """The down-sampled image."""
        smaller: Tensor = self.body(image)
        return smaller


class TeacherOutput(NamedTuple):
    """What the teacher's losses need: the enlarged image, and one image for each supervised level, HR/2 first."""

    sr: Tensor  # [B, c, H, W]
    encoded: list[Tensor]  # sizes HR / f for f in `PrivilegedTeacher.encoder_scales`
    degraded: list[Tensor]  # and for f in `degradation_scales`


class PrivilegedTeacher(nn.Module):
    """Encoder, F (`.network`) and degradation; HR in (`takes` "hr"), or LR with the encoder "bicubic" (`takes` "lr").

    `levels` is how many levels are supervised, counted from HR (None: all; x4: up to 2, x2 and x3: 1). The encoder
    always goes down to the LR size; PISR's has that one level. Where nothing of the degradation would be supervised
    it is not built, so that every parameter gets a gradient. `tie_sdm` lets the SDM share the HFRM's weights
    (equations 4-5 print one symbol for both). 82,668 parameters with HFRM and SDM, tied 47,656 (luma, FSRCNN).
    `network` names F (see `models.NETWORKS`); `upsampling` is its form: "transposed" for training,
    "subpixel" for inference; `form`: `residual` and `collapse` of F (`SRNetwork`), and
    `first_weights`.

    `encoder_scales` and `degradation_scales` are the down-sampling factors from HR of the supervised levels, e.g.
    (2, 4): the targets are X' = HR/2 and X'' = HR/4.
    """

    def __init__(
        self,
        scale: int,
        channels: int = 1,
        encoder: Encoder = "hfrm",
        degradation: Degradation = "sdm",
        tie_sdm: bool = False,
        levels: int | None = None,
        network: str = "fsrcnn",
        upsampling: Upsampling = "transposed",
        **form: Any,
    ) -> None:
        super().__init__()
        _check_names(scale, encoder, degradation, network, upsampling)
        if tie_sdm and (encoder, degradation) != ("hfrm", "sdm"):
            raise UserError(
                f"tie_sdm needs encoder 'hfrm' and degradation 'sdm', not '{encoder}' and '{degradation}'; "
                "set it to false"
            )
        strides = STRIDES[scale]
        factors = tuple(math.prod(strides[: level + 1]) for level in range(len(strides)))
        encoded = {"hfrm": factors, "pisr": (scale,), "bicubic": ()}[encoder]
        degraded = () if degradation == "none" else factors
        most = max(len(encoded), len(degraded))
        if levels is None:
            levels = most
        if not 0 <= levels <= most:
            raise UserError(
                f"levels is {levels}; encoder '{encoder}' and degradation '{degradation}' at x{scale} have "
                + (f"0 to {most} levels to supervise" if most else "no level to supervise; set it to 0")
            )
        if tie_sdm and levels == 0:
            raise UserError("tie_sdm has no effect with levels 0, which uses no SDM; set it to false")
        self.scale = scale
        self.channels = channels
        self.takes: Literal["lr", "hr"] = "lr" if encoder == "bicubic" else "hr"
        self.arguments: dict[str, Any] = {
            "scale": scale,
            "channels": channels,
            "encoder": encoder,
            "degradation": degradation,
            "tie_sdm": tie_sdm,
            "levels": levels,
            "network": network,
            "upsampling": upsampling,
        }
        self.encoder_scales: tuple[int, ...] = encoded[:levels]
        self.degradation_scales: tuple[int, ...] = degraded[:levels]
        self._recursions = len(encoded)  # all that F's input needs, supervised or not
        self.encoder: nn.Module | None = None
        if encoder == "hfrm":
            self.encoder = HFRM(channels, strides[0])
        elif encoder == "pisr":
            self.encoder = PISREncoder(channels, scale)
        if self.encoder is not None and form.get("first_weights") == "pytorch":
            draw_as_pytorch(self.encoder)
        self.network = build_network(network, scale, channels, upsampling, **form)
        self.arguments |= {key: self.network.arguments[key] for key in form if key in self.network.arguments}
        self._degradation_kind = degradation
        self.degradation: nn.Module | None = None  # of a tied SDM too: it is the encoder
        if degradation == "sdm" and levels and not tie_sdm:
            self.degradation = HFRM(channels, strides[0])
        elif degradation == "cnn" and levels:
            self.degradation = nn.ModuleList(StridedCNN(channels, strides[: level + 1]) for level in range(levels))
        if self.degradation is not None and form.get("first_weights") == "pytorch":
            draw_as_pytorch(self.degradation)

    @property
    def FASTER_LAYOUT(self) -> dict[str, str]:
        """F's memory layouts."""
        return self.network.FASTER_LAYOUT

    @property
    def global_skip(self) -> str:
        """F's residual."""
        return self.network.global_skip

    @property
    def map_channels(self) -> dict[str, int]:
        """F's feature maps and their channels."""
        return self.network.map_channels

    @property
    def DISTILLED(self) -> str:
        """F's distilled layer."""
        return self.network.DISTILLED

    def forward(self, image: Tensor, supervised: bool = False, maps: Sequence[str] = ()) -> Any:
        """The enlarged image `[B, c, H, W]`; with `supervised`, a `TeacherOutput` with the supervised levels too;
        with `maps`, a pair of the image and F's feature maps of these names.

        `image` is HR `[B, c, H, W]`, or LR `[B, c, H/s, W/s]` when `takes` is "lr"; H and W are multiples of s.
        """
        encoded = self.encode(image)
        lr = encoded[-1] if encoded else image
        if maps:
            return self.network(lr, maps=maps)
        enlarged = self.network(lr)
        if not supervised:
            return enlarged
        return TeacherOutput(enlarged, encoded[: len(self.encoder_scales)], self._degrade(enlarged))

    def features(self, image: Tensor, name: str) -> Tensor:
        """F's feature map `name` for `image`; nothing behind it is computed."""
        encoded = self.encode(image)
        return self.network.features(encoded[-1] if encoded else image, name)

    def deploy(self) -> PrivilegedTeacher:
        """A copy for inference, in eval mode: F in its inference form, no degradation and nothing supervised."""
        deployed = copy.deepcopy(self)
        deployed.network = self.network.deploy()
        deployed.degradation = None
        deployed._degradation_kind = "none"
        deployed.encoder_scales = deployed.degradation_scales = ()
        deployed.arguments |= {
            "degradation": "none",
            "tie_sdm": False,
            "levels": 0,
            "upsampling": "subpixel",
        }
        deployed.arguments.pop("collapse", None)
        return deployed.eval()

    def encode(self, image: Tensor) -> list[Tensor]:
        """The encoder's images of HR `[B, c, H, W]`, from the largest to the LR image (X^' = G(Y), X^'' = G(X^')).

        None with the encoder "bicubic", which is fed with the LR image.
        """
        images: list[Tensor] = []
        for _ in range(self._recursions):
            assert self.encoder is not None
            images.append(self.encoder(images[-1] if images else image))
        return images

    def _degrade(self, enlarged: Tensor) -> list[Tensor]:
        """The degraded images of the supervised levels, from the largest."""
        if self._degradation_kind == "bicubic":
            return [downsample(enlarged, factor) for factor in self.degradation_scales]
        if isinstance(self.degradation, nn.ModuleList):
            return [stack(enlarged) for stack in self.degradation]
        images: list[Tensor] = []
        sdm = self.encoder if self.arguments["tie_sdm"] else self.degradation
        for _ in self.degradation_scales:
            assert sdm is not None
            images.append(sdm(images[-1] if images else enlarged))
        return images


class VIDEstimator(nn.Module):
    """q(t | student's map) of variational information distillation; used in training only, 12,770 parameters at 56.

    Two branches Conv1x1-PReLU-Conv1x1 with their own weights; the second ends in `scale` softplus(.) + 1e-8. PISR's
    code has the scale 0.1, DSSD's equation 18 prints none (1).
    """

    def __init__(self, channels: int = 56, scale: float = SCALE_FACTOR) -> None:
        super().__init__()
        self.scale = scale
        self.mu = nn.Sequential(conv_prelu(channels, channels, 1), conv(channels, channels, 1))
        self.b = nn.Sequential(conv_prelu(channels, channels, 1), conv(channels, channels, 1))

    def forward(self, student_map: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` -> location `mu` and scale `b` > 0 of the teacher's map, both `[B, C, H, W]` float32.

        Autocast is switched off here: the loss divides by b, which half precision would round to a few values.
        """
        weight = next(self.parameters())
        with torch.autocast(student_map.device.type, enabled=False):
            inputs = student_map.to(weight.dtype)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            mu, b = self.mu(inputs).to(dtype), self.b(inputs).to(dtype)
            return mu, scaled_softplus(b, self.scale, SMALLEST_SCALE)


def _check_names(scale: int, encoder: str, degradation: str, network: str, upsampling: str) -> None:
    if scale not in STRIDES:
        raise UserError(f"the privileged teacher has no scale {scale}; valid: {', '.join(map(str, STRIDES))}")
    choices: dict[str, tuple[str, tuple[str, ...]]] = {
        "encoder": (encoder, get_args(Encoder)),
        "degradation": (degradation, get_args(Degradation)),
        "network": (network, tuple(NETWORKS)),
        "upsampling": (upsampling, get_args(Upsampling)),
    }
    for key, (value, valid) in choices.items():
        if value not in valid:
            raise UserError(f"{key} is '{value}'; {nearest(value, valid)}")

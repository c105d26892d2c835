"""A user shader for video players: mpv and what builds on libplacebo run an FSRCNN on the luma of what they show."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from torch import nn

from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats.base import Format, NotVerified, Opened, Options, Verified
from hpcdistill.deploy.formats.shader_player import NotPlayed, missing, play, version
from hpcdistill.deploy.formats.shader_source import MARK, shader_source
from hpcdistill.deploy.session import Batch, Session
from hpcdistill.errors import UserError
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.storage import write_bytes

SCALES = (2, 3, 4)
PSNR_CHANGE = 0.1  # dB that a photograph may differ by from what PyTorch makes of it


class Shader(Format):
    """A text file for `mpv --glsl-shaders=`; needs nothing to be written, and ffmpeg with libplacebo to be verified.

    Players keep what is between two passes in 16-bit floats, hence the tolerance. Measured with Mesa's lavapipe, which
    rounds them towards zero: 0.001 for the shipped students, 0.0045 for one whose last layer makes the whole image.
    """

    name = "shader"
    suffix = ".glsl"
    tolerance: ClassVar[float] = 6e-3

    def check(self, network: nn.Module, about: Description, options: Options) -> None:
        """UserError also for what is no FSRCNN on luma at x2, x3 or x4."""
        super().check(network, about, options)
        if about.network != "FSRCNN":
            raise UserError(f"a shader can be made of an FSRCNN only, and this is a {about.network}; export it to onnx")
        if about.colour != "luma" or about.channels != 1:
            raise UserError("a shader works on the luma of video, and this FSRCNN takes RGB; train one with channels=1")
        if about.scale not in SCALES:
            raise UserError(f"a shader enlarges by 2, 3 or 4, and this FSRCNN by {about.scale}; export it to onnx")

    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        text = shader_source(cast(FSRCNN, network).deploy(), about, path.name)
        write_bytes(path, text.encode())
        return (path,)

    def remarks(self, path: Path, about: Description, options: Options) -> tuple[str, ...]:
        return (f"mpv --glsl-shaders={path} VIDEO plays with it; RGB sources (PNG, most photographs) skip it silently",)

    def open(self, path: Path) -> Opened:
        raise UserError(
            f"{path}: is a shader, which video players run (mpv --glsl-shaders={path.name}); give the network"
        )

    def verify(
        self, network: nn.Module, about: Description, path: Path, options: Options, allowed: float
    ) -> Verified | NotVerified:
        """Played by ffmpeg's libplacebo filter; NotVerified where that, or its Vulkan device, is missing or fails."""
        from hpcdistill.deploy.verification import compare, in_words

        clamped = nn.Sequential(network, nn.Hardtanh(0.0, 1.0))  # players show nothing beyond black and white
        try:
            if reason := missing():
                return NotVerified(reason)
            report = compare(clamped, about, _played(path, about.scale), self.runtime(), allowed)
        except NotPlayed as error:  # a driver that fails keeps nobody from exporting
            return NotVerified(str(error))
        if report.psnr_change is not None and not abs(report.psnr_change) <= PSNR_CHANGE:
            raise UserError(f"{in_words(report)}: more than the {PSNR_CHANGE:g} dB allowed; nothing was written")
        return report

    def runtime(self) -> str:
        return f"libplacebo in ffmpeg {version()}"

    def is_ours(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                return file.read(len(MARK)) == MARK.encode()
        except OSError:
            return False


def _played(path: Path, scale: int) -> Session:
    """The shader as a network: images become frames of 16 bits."""

    def run(images: Batch) -> Batch:
        frames = np.round(np.clip(images[:, 0], 0, 1) * 65535).astype(np.uint16)
        return np.ascontiguousarray(play(path, frames, scale, depth=16)[:, None])

    return run

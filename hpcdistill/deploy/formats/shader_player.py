"""A user shader in a player without a window: ffmpeg's libplacebo filter, which runs mpv's shaders on Vulkan."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpcdistill.errors import UserError

FFMPEG = "ffmpeg"
SECONDS = 300  # a CPU that stands in for a GPU compiles a shader for some seconds; what needs more hangs
Depth = Literal[8, 10, 16]
# Of a plane in its bits: planes of zero chroma, which stay beside the luma, are what makes it no RGB.
_LAYOUTS: dict[Depth, str] = {8: "yuv444p", 10: "yuv444p10le", 16: "yuv444p16le"}
_GRAY = {8: "gray", 16: "gray16le"}
_DEVICE = ("-init_hw_device", "vulkan=v", "-filter_hw_device", "v")


class NotPlayed(UserError):
    """The player itself failed: nothing is known of the shader."""


def missing() -> str | None:
    """Why no shader can be played here, in a few words with the remedy; None where one can."""
    if shutil.which(FFMPEG) is None:
        return "there is no ffmpeg (Debian: apt-get install ffmpeg)"
    options = _run([FFMPEG, "-hide_banner", "-h", "filter=libplacebo"], 60).stdout
    if b"custom_shader_path" not in options:
        return "this ffmpeg has no libplacebo filter that takes shaders (5.0 and later, built with it, do)"
    nothing = ["-f", "lavfi", "-i", "nullsrc=s=16x16", "-frames:v", "1", "-f", "null", "-"]
    if _run([FFMPEG, "-nostdin", "-v", "error", *_DEVICE, *nothing], 60).returncode:
        return "there is no Vulkan device (Debian, on a CPU: apt-get install mesa-vulkan-drivers)"
    return None


def version() -> str:
    """ffmpeg's, for reports."""
    words = _run([FFMPEG, "-version"], 60).stdout.decode(errors="replace").split()
    return words[2] if len(words) > 2 else "unknown"


def play(
    shader: Path,
    frames: NDArray[np.uint8] | NDArray[np.uint16],
    scale: int,
    depth: Depth = 8,
    shown: Literal[8, 16] = 16,
) -> NDArray[np.float32]:
    """What `shader` makes of the luma of a clip `[N, H, W]` with `depth` bits: `[N, scale H, scale W]`.

    In the units that the shader itself sees, where 2^depth - 1 is 1, rounded to `shown` bits; nothing is dithered.
    Limited range is shifted from one depth to another, not stretched: 235 of 8 bits is 235 * 256 of 16.
    What is beyond black and white is clipped. UserError, with what ffmpeg says, when it leaves the shader out;
    NotPlayed when it fails.
    """
    count, height, width = frames.shape
    plane = np.dtype(np.uint8) if depth == 8 else np.dtype("<u2")
    chroma = np.full((2, height, width), 2 ** (depth - 1), plane).tobytes()
    clip = b"".join(frame.astype(plane).tobytes() + chroma for frame in frames)
    filtered = f"libplacebo=w={width * scale}:h={height * scale}:custom_shader_path=shader.glsl"
    source = ["-f", "rawvideo", "-pixel_format", _LAYOUTS[depth], "-video_size", f"{width}x{height}"]
    source += ["-color_range", "tv", "-colorspace", "bt709", "-i", "clip.yuv"]
    steps = f"hwupload,{filtered}:dithering=-1:format={_GRAY[shown]},hwdownload,format={_GRAY[shown]}"
    # Plain names in a folder of their own: a path inside a filter would have to be quoted three times over.
    with tempfile.TemporaryDirectory(prefix="hpcdistill-shader-") as folder:
        shutil.copyfile(shader, Path(folder) / "shader.glsl")
        (Path(folder) / "clip.yuv").write_bytes(clip)
        command = [FFMPEG, "-nostdin", "-v", "warning", *_DEVICE, *source, "-vf", steps, "-f", "rawvideo", "played.raw"]
        done = _run(command, SECONDS, folder)
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        played = Path(folder) / "played.raw"
        values = np.frombuffer(played.read_bytes() if played.exists() else b"", "u1" if shown == 8 else "<u2")
    # A shader that does not compile is left out, with a warning, and the clip is enlarged without it.
    if refused := re.search(r"glslang failed: .*|Failed executing hook.*", said):
        raise UserError(f"{shader.name}: ffmpeg leaves it out: {refused[0]:.600}")
    if done.returncode or values.size != count * height * width * scale**2:
        raise NotPlayed(f"ffmpeg cannot play a clip here: {said:.600}")
    unit = 2.0**shown * (2.0**depth - 1) / 2.0**depth
    made: NDArray[np.float32] = (values.astype(np.float64) / unit).astype(np.float32)
    return made.reshape(count, height * scale, width * scale)


def _run(command: list[str], seconds: float, folder: str | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=seconds, cwd=folder, check=False)
    except subprocess.TimeoutExpired:
        raise NotPlayed(f"{FFMPEG} did not end within {seconds:g} s; its Vulkan driver may hang") from None
    except OSError as error:
        raise NotPlayed(f"{FFMPEG}: cannot be run ({error.strerror})") from None

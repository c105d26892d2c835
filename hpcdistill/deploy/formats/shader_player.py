"""A user shader in a player without a window: ffmpeg's libplacebo filter, which runs mpv's shaders on Vulkan."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcdistill.errors import UserError

FFMPEG = "ffmpeg"
SECONDS = 300  # a CPU that stands in for a GPU compiles a shader for some seconds; who needs more hangs
WHITE = 65280  # of a luma plane of 16 bits where 255 is one of 8 bits: limited range is shifted, not stretched
_DEVICE = ("-init_hw_device", "vulkan=v", "-filter_hw_device", "v")


def missing() -> str | None:
    """Why no shader can be played here, in a few words with the remedy; None where one can."""
    if shutil.which(FFMPEG) is None:
        return "there is no ffmpeg (Debian: apt-get install ffmpeg)"
    help_text = _run([FFMPEG, "-hide_banner", "-h", "filter=libplacebo"], 30).stdout.decode(errors="replace")
    if "custom_shader_path" not in help_text:
        return "this ffmpeg has no libplacebo filter (5.0 and later have, where they are built with it)"
    probe = [
        FFMPEG,
        "-v",
        "error",
        *_DEVICE,
        "-f",
        "lavfi",
        "-i",
        "nullsrc=s=16x16",
        "-frames:v",
        "1",
        "-f",
        "null",
        "-",
    ]
    if _run(probe, 60).returncode:
        return "there is no Vulkan device (Debian, on a CPU: apt-get install mesa-vulkan-drivers)"
    return None


def play(shader: Path, frames: NDArray[np.uint8], scale: int, bits: int = 16) -> NDArray[np.uint16 | np.uint8]:
    """The luma of a clip `[N, H, W]` (8 bits, studio range) that `shader` enlarges: `[N, scale H, scale W]`.

    Of 16 bits, where WHITE is what 255 is of the frames, or of 8, rounded, as a screen has it; nothing is dithered.
    UserError when ffmpeg fails, with what it said, or when the shader was not taken.
    """
    count, height, width = frames.shape
    size = height * scale, width * scale
    chroma = np.full((2, height, width), 128, np.uint8)
    clip = b"".join(frame.tobytes() + chroma.tobytes() for frame in frames)
    layout, dtype = ("gray16le", np.dtype("<u2")) if bits == 16 else ("gray", np.dtype(np.uint8))
    with tempfile.TemporaryDirectory(prefix="hpcdistill-shader-") as folder:
        # Plain names in its own folder: a filter's options have no safe way to quote a path.
        shutil.copyfile(shader, Path(folder) / "shader.glsl")
        (Path(folder) / "clip.yuv").write_bytes(clip)
        video = f"libplacebo=w={size[1]}:h={size[0]}:custom_shader_path=shader.glsl:dithering=-1:format={layout}"
        source = ["-pixel_format", "yuv444p", "-video_size", f"{width}x{height}"]
        source += ["-color_range", "tv", "-colorspace", "bt709", "-i", "clip.yuv"]
        command = [FFMPEG, "-nostdin", "-v", "warning", *_DEVICE, "-f", "rawvideo", *source]
        command += ["-vf", f"hwupload,{video},hwdownload,format={layout}", "-f", "rawvideo", "played.raw"]
        done = _run(command, SECONDS, folder)
        played = Path(folder) / "played.raw"
        words = done.stderr.decode(errors="replace")
        if done.returncode or not played.exists():
            raise UserError(f"{shader}: ffmpeg cannot play it: {words.strip() or done.returncode:.500}")
        values = np.fromfile(played, dtype)
    if values.size != count * size[0] * size[1]:
        raise UserError(f"{shader}: ffmpeg made {values.size} luma values of {count} frames; {words.strip():.500}")
    return values.reshape(count, *size)


def _run(command: list[str], seconds: float, folder: str | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=seconds, cwd=folder, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not end within {seconds:g} s; its Vulkan driver may hang") from None
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror})") from None

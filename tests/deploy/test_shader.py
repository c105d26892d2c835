"""Shaders: their text run in float64 against the network, and played by ffmpeg on what Vulkan device there is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_shader import emulate, passes_of, rpn
from PIL import Image

from hpcdistill.deploy.description import Description, describe
from hpcdistill.deploy.formats.base import NotVerified, Options, Verified
from hpcdistill.deploy.formats.shader import Shader
from hpcdistill.deploy.formats.shader_player import missing, play
from hpcdistill.deploy.formats.shader_source import SHARED_BYTES, shader_source
from hpcdistill.deploy.model import load_network
from hpcdistill.deploy.shipped import pretrained_file
from hpcdistill.deploy.verification import export
from hpcdistill.errors import UserError
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.idn import IDN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.ops.colour import luma_uint8
from hpcdistill.ops.downsampling import downsample_uint8

# Half floats between passes, which Mesa's lavapipe rounds towards zero: 0.001 at most was measured with these networks.
PLAYED = 0.002
HEIGHT, WIDTH = 45, 62  # of the clip: neither is a multiple of a work group's side
MEAN = {"none": 0.4, "bicubic": 0.0}  # of what the layers of a random network make


@pytest.fixture(scope="module")
def player() -> Iterator[None]:
    """Skips what needs ffmpeg with libplacebo and a Vulkan device, a CPU's will do."""
    if reason := missing():
        pytest.skip(f"no shader is played here: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALLIVM_PERF", "nopt")  # lavapipe compiles in half the time, and these clips are short
        yield


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Luma `[4 HEIGHT, 4 WIDTH]` of two real images, 8 bits: of Set5 where it is there."""
    folder = os.environ.get("HPCDISTILL_TEST_DATA")
    if folder:
        files = sorted((Path(folder) / "sr_test" / "Set5" / "HR").iterdir())
        images = [np.asarray(Image.open(file).convert("RGB")) for file in files if file.stem in ("butterfly", "bird")]
    else:
        from skimage.data import astronaut

        images = [astronaut()[:, :256], astronaut()[:, 256:]]
    assert len(images) == 2
    return [np.round(luma_uint8(image[: 4 * HEIGHT, : 4 * WIDTH]) * 255).astype(np.uint8) for image in images]


def random_network(
    scale: int, d: int, s: int, m: int = 1, residual: str = "none", gain: float = 0.1
) -> tuple[FSRCNN, Description]:
    """Visible weights and slopes; its last layer makes values about 0.4, or 0 where the bicubic image is added."""
    torch.manual_seed(scale * d + s)
    network = FSRCNN(scale, d=d, s=s, m=m, residual=residual).deploy()
    with torch.no_grad():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        made = network.upsampling(network.features(torch.rand(1, 1, 32, 32), "expanding"))
        network.upsampling.conv.weight *= gain / made.std()
        network.upsampling.conv.bias *= gain / made.std()
        network.upsampling.conv.bias += MEAN[residual] - made.mean() * gain / made.std()
    return network, describe(network, {}, Path("random.safetensors"))


def expected(network: torch.nn.Module, frames: np.ndarray, depth: int = 8) -> np.ndarray:
    with torch.no_grad():
        values = torch.from_numpy(frames[:, None].astype(np.float32) / (2**depth - 1))
        return network(values)[:, 0].clamp(0, 1).numpy()  # no screen shows what is beyond black and white


def difference(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.abs(made.clip(0, 1) - wanted)


def shipped(scale: int) -> tuple[FSRCNN, Description]:
    network, about, _ = load_network(pretrained_file(f"pretrained:x{scale}"))
    return network, about


# --- the text


@pytest.mark.parametrize(
    ("scale", "d", "s", "m", "residual"),
    [
        (2, 5, 3, 1, "bicubic"),  # no multiples of 4
        (3, 1, 1, 2, "none"),
        (2, 36, 4, 1, "none"),  # more features than shared memory holds at once
        (4, 57, 17, 1, "bicubic"),  # five groups of channels: a second row of them in each texture
    ],
)
def test_text_computes_what_the_network_does(scale: int, d: int, s: int, m: int, residual: str) -> None:
    network, about = random_network(scale, d, s, m, residual)
    image = np.random.default_rng(0).random((19, 21))  # four work groups, none of them full but one
    made = emulate(shader_source(network, about), image, (19 * scale, 21 * scale))
    with torch.no_grad():
        wanted = network.double()(torch.from_numpy(image)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6)  # the literals are float32


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_text_of_the_shipped_students(scale: int) -> None:
    network, about = shipped(scale)
    image = np.random.default_rng(0).random((6, 3))
    made = emulate(shader_source(network, about), image, (6 * scale, 3 * scale))
    with torch.no_grad():
        wanted = network.double()(torch.from_numpy(image)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6)


def test_passes_are_those_of_the_design() -> None:
    passes = passes_of(shader_source(*shipped(4)))
    assert len(passes) == 6
    assert [step.directives["BIND"] for step in passes[:2]] == [["LUMA"], ["LUMA", "HPCDISTILL_A"]]
    assert [step.directives.get("SAVE") for step in passes[-2:]] == [["HPCDISTILL_A"], None]
    for step, width, block in ((passes[0], "LUMA.w 3 *", "48 16 16 16"), (passes[-1], "LUMA.w 4 *", "64 64 16 16")):
        assert (step["WIDTH"], step["COMPUTE"]) == (width, block)
    assert [step["COMPONENTS"] for step in passes] == ["4"] * 5 + ["1"]
    assert all(step["DESC"].startswith("hpcdistill FSRCNN x4 (") for step in passes)


@pytest.mark.parametrize(("scale", "least"), [(2, 1.414), (3, 2.122), (4, 2.829)])
def test_runs_only_where_the_picture_is_shown_large(scale: int, least: float) -> None:
    network, about = random_network(scale, 4, 4)
    text = shader_source(network, about)
    for height, width, runs in ((1.01, 1.01, True), (0.99, 1.01, False), (1.01, 0.99, False)):
        output = int(1000 * least * width), int(500 * least * height)
        values = {rpn(step["WHEN"], {"LUMA": (1000, 500), "OUTPUT": output}) for step in passes_of(text)}
        assert values == {float(runs)}


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("d", [1, 56, 130])
def test_shared_memory_has_room_on_every_device(scale: int, d: int) -> None:
    network, about = random_network(scale, d, 4)
    body = passes_of(shader_source(network, about))[-1].body
    slots, texels = (int(part.split("]")[0]) for part in body.split(";")[0].split("[")[1:])
    assert 0 < slots * texels * 16 <= SHARED_BYTES == 16384  # what Vulkan promises
    assert slots * texels * 16 > SHARED_BYTES / 2 or slots * 4 >= d


def test_textures_of_4k_video_have_room_on_every_device() -> None:
    step = passes_of(shader_source(*random_network(2, 4, 65)))[0]
    sizes = {"LUMA": (3840, 2160), "OUTPUT": (7680, 4320)}
    assert rpn(step["WIDTH"], sizes) * rpn(step["HEIGHT"], sizes) >= 3840 * 2160 * 65 / 4
    assert max(rpn(step["WIDTH"], sizes), rpn(step["HEIGHT"], sizes)) <= 16384


def test_file_says_what_it_is(tmp_path: Path) -> None:
    network, about = shipped(3)
    (path,) = Shader().write(network, about, tmp_path / "mine.glsl", Options())
    header = path.read_text().split("//!DESC")[0]
    for words in ("FSRCNN x3", "non-commercial research", "T91 (90 images)", "--glsl-shaders=mine.glsl"):
        assert words in header
    assert "RGB sources" in header
    assert "no player says so" in header
    assert "studio range" in header
    assert all(line.startswith("//") or not line for line in header.splitlines())
    (described,) = (line for line in header.splitlines() if line.startswith("// hpcdistill: "))
    assert Description.from_json(described.removeprefix("// hpcdistill: "), "header") == about
    (remark,) = Shader().remarks(path, about, Options())
    assert "RGB sources" in remark
    assert [file.name for file in tmp_path.iterdir()] == ["mine.glsl"]


def test_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / name / "x2.glsl" for name in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        Shader().write(*shipped(2), file, Options())
    assert files[0].read_bytes() == files[1].read_bytes()


def test_notes_of_a_run_cannot_become_directives() -> None:
    network, _ = random_network(2, 4, 4)
    about = Description(
        "super-resolution",
        "FSRCNN",
        scale=2,
        colour="luma",
        data="mine\n//!HOOK MAIN\r\u2028void hook()",
        licence="//!",
    )
    text = shader_source(network, about)
    assert len(passes_of(text)) == 3
    (described,) = (line for line in text.splitlines() if line.startswith("// hpcdistill: "))
    assert json.loads(described.removeprefix("// hpcdistill: "))["licence"] == "//!"
    assert text.index("//!") == text.index("//!DESC hpcdistill")
    assert all(line.startswith("//") or not line for line in text.split("//!DESC")[0].splitlines())


def test_wide_and_transposed_networks_are_written_in_their_plain_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = FSRCNN(2, d=4, s=4, m=1, collapse={"form": "linear", "width": 8}).eval()
    about = describe(wide, {}, tmp_path / "wide.safetensors")
    (path,) = Shader().write(wide, about, tmp_path / "wide.glsl", Options())
    assert path.read_text() == shader_source(wide.deploy(), about, "wide.glsl")


# --- what is refused


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (FSRCNN(2, channels=3, d=4, s=4, m=1), "luma of video, and this FSRCNN takes RGB"),
        (IDN(2), "FSRCNN only, and this is a IDN"),
        (FSRCNN(5, d=4, s=4, m=1), "by 2, 3 or 4, and this FSRCNN by 5"),
    ],
)
def test_other_networks_are_refused(network: torch.nn.Module, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Shader().check(network, describe(network, {}, Path("other.safetensors")), Options())


def test_teachers_are_refused() -> None:
    with pytest.raises(UserError, match="teacher that sees the high-resolution image"):
        describe(PrivilegedTeacher(2), {}, Path("teacher.safetensors"))


@pytest.mark.parametrize("options", [Options(half=True), Options(graph="rgb"), Options(opset=18)])
def test_options_of_other_formats_are_refused(options: Options) -> None:
    with pytest.raises(UserError, match="is not for shader"):
        Shader().check(*random_network(2, 4, 4), options)


def test_is_not_opened(tmp_path: Path) -> None:
    (path,) = Shader().write(*random_network(2, 4, 4), tmp_path / "a.glsl", Options())
    with pytest.raises(UserError, match=r"a shader, which video players run \(mpv --glsl-shaders=a.glsl\)"):
        Shader().open(path)
    assert Shader().is_ours(path)
    (tmp_path / "other.glsl").write_text("// FSRCNNX\n//!HOOK LUMA\n")
    assert not Shader().is_ours(tmp_path / "other.glsl")


# --- played


@pytest.mark.usefixtures("player")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shipped_students_played(scale: int, photographs: list[np.ndarray], tmp_path: Path) -> None:
    network, about = shipped(scale)
    (path,) = Shader().write(network, about, tmp_path / "student.glsl", Options())
    originals = np.stack([image[: HEIGHT * scale, : WIDTH * scale] for image in photographs])
    clip = np.stack([downsample_uint8(image[..., None], scale)[..., 0] for image in originals])
    wanted, made = expected(network, clip), play(path, clip, scale)
    assert difference(made, wanted).max() < PLAYED
    edge = np.ones(wanted.shape, bool)
    edge[:, scale:-scale, scale:-scale] = False
    assert difference(made, wanted)[edge].max() < PLAYED
    shown = play(path, clip, scale, shown=8)  # as a screen has it
    assert difference(shown, wanted).max() < PLAYED + 0.5 / 255
    errors = [np.mean((np.clip(image, 0, 1) - originals / 255) ** 2) for image in (wanted, shown)]
    assert abs(10 * np.log10(errors[0] / errors[1])) < 0.1  # dB


@pytest.mark.usefixtures("player")
@pytest.mark.parametrize(
    ("scale", "d", "s", "residual", "depth"),
    [(3, 6, 5, "none", 8), (2, 37, 3, "bicubic", 10), (4, 4, 18, "bicubic", 8)],
)
def test_random_networks_played(
    scale: int, d: int, s: int, residual: str, depth: int, photographs: list[np.ndarray], tmp_path: Path
) -> None:
    network, about = random_network(scale, d, s, residual=residual, gain=0.05)
    (path,) = Shader().write(network, about, tmp_path / "random.glsl", Options())
    clip = np.stack(photographs)[:, :33, :47].astype(np.uint16) * 2 ** (depth - 8)
    wanted, made = expected(network, clip, depth), play(path, clip, scale, depth)
    assert wanted.std() > 0.03  # else nothing is compared
    assert difference(made, wanted).max() < PLAYED


@pytest.mark.usefixtures("player")
def test_export_is_verified_by_playing_it(tmp_path: Path) -> None:
    network, about = random_network(2, 5, 3, residual="bicubic")
    path = tmp_path / "mine.glsl"
    files, report = export(Shader(), network, about, path, Options())
    assert files == (path,)
    assert isinstance(report, Verified)
    assert report.difference < PLAYED
    assert abs(report.psnr_change) < 0.1
    assert "libplacebo in ffmpeg" in report.runtime
    export(Shader(), network, about, path, Options())  # ours may be replaced


@pytest.mark.usefixtures("player")
@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("void hook() {", "void hook() { no GLSL;", "wrong.glsl: ffmpeg leaves it out: .*'no'"),
        ("//!HOOK LUMA", "//!HOOK MAIN", "more than the 6.0e-03 that is allowed"),
        ("-1 - i", "-i", "more than the 6.0e-03 that is allowed"),  # another border
    ],
)
def test_wrong_shaders_are_found(
    right: str, wrong: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: object) -> str:
        text = shader_source(*arguments)
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.setattr("hpcdistill.deploy.formats.shader.shader_source", damaged)
    network, about = random_network(2, 4, 4, residual="bicubic")
    with pytest.raises(UserError, match=words):
        export(Shader(), network, about, tmp_path / "wrong.glsl", Options())
    assert not list(tmp_path.iterdir())


def test_without_a_player_it_is_written_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    files, report = export(Shader(), *random_network(2, 4, 4), tmp_path / "mine.glsl", Options())
    assert files[0].is_file()
    assert report == NotVerified("there is no ffmpeg (Debian: apt-get install ffmpeg)")


def test_player_that_fails_keeps_nobody_from_exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "ffmpeg"  # as one whose driver takes no clip
    command.write_text(
        '#!/bin/sh\ncase "$*" in *clip.yuv*) echo no such device >&2; exit 1;; *) echo custom_shader_path;; esac\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    files, report = export(Shader(), *random_network(2, 4, 4), tmp_path / "mine.glsl", Options())
    assert files[0].is_file()
    assert report == NotVerified("ffmpeg cannot play a clip here: no such device")

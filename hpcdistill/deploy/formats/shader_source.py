"""FSRCNN as a user shader of mpv and libplacebo: compute passes on the luma plane, weights as literals.

Pass 1 makes the features (5x5) and shrinks them; one pass for each mapping layer (3x3) follows; the last one expands
the features into shared memory, convolves them to the sub-pixels and adds the bicubic enlargement. Between passes four
channels share a texel, and textures hold these groups side by side. Channels are padded with zeros to full groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hpcdistill.deploy.description import METADATA_KEY, UNKNOWN, Description
from hpcdistill.errors import plural
from hpcdistill.ops.bicubic import kernel_phases
from hpcdistill.ops.enlargement import REACH

Weights = NDArray[np.float32]

MARK = "// hpcdistill shader:"  # what the files begin with
MAX_SHRINK = 1.414  # the player may have to shrink what the network made by this much, a convention of prescalers
GROUP = 4  # channels in a texel
ACROSS = 4  # groups side by side in a texture, before a new row of them: widths stay below 16384 for 4K
BLOCK = 16  # pixels on a side of what a work group makes; 256 threads
SHARED_BYTES = 16384  # of shared memory that every Vulkan and OpenGL device has

# Zero outside the image, as the network pads; a texture repeats its edge.
_WITHIN = """\
bool within(ivec2 p, ivec2 size) {
    return all(greaterThanEqual(p, ivec2(0))) && all(lessThan(p, size));
}
"""
_LUMA = """\
float luma(ivec2 p, ivec2 size) {
    return within(p, size) ? LUMA_mul * texelFetch(LUMA_raw, p, 0).x : 0.0;
}
"""
_PART = """\
vec4 part(int group, ivec2 p, ivec2 size) {{
    ivec2 place = p + ivec2(group % {across}, group / {across}) * size;
    return within(p, size) ? texelFetch({texture}_raw, place, 0) : vec4(0.0);
}}
"""
# As MATLAB continues an image: x1 x0 | x0 x1.
_MIRRORED = """\
int mirrored(int i, int length) {
    i = i < 0 ? -1 - i : i;
    i = i >= length ? 2 * length - 1 - i : i;
    return clamp(i, 0, length - 1);
}

float beyond(ivec2 p, ivec2 size) {
    return LUMA_mul * texelFetch(LUMA_raw, ivec2(mirrored(p.x, size.x), mirrored(p.y, size.y)), 0).x;
}
"""
_PRELU = """\
vec4 prelu(vec4 v, float slope) {
    return max(v, 0.0) + slope * min(v, 0.0);
}
"""


def shader_source(network: nn.Module, about: Description, name: str = "student.glsl") -> str:
    """The text of the shader for an FSRCNN on luma, in its sub-pixel form, of any d, s and m and scale.

    The same network gives the same text. `name` is the file's, for the header.
    """
    net = cast(Any, network)
    scale, mapping = int(net.scale), len(net.mapping)
    groups = _groups(net.shrinking[0].out_channels)
    title = f"hpcdistill FSRCNN x{scale}"
    texts = [_header(about, name, scale)]
    stages = ["features, shrinking", *(f"mapping {n + 1}" for n in range(mapping)), "expanding, enlarging"]
    for number, stage in enumerate(stages):
        description = f"{title} ({number + 1} of {len(stages)}: {stage})"
        last = number == len(stages) - 1
        # Two names in turn are enough, and keep players from holding every map.
        source, target = (f"HPCDISTILL_{'AB'[(number + turn) % 2]}" for turn in (1, 0))
        texts.append(_magic(description, scale, None if number == 0 else source, None if last else target, groups))
        if number == 0:
            texts.append(_first_pass(net))
        elif last:
            texts.append(_last_pass(net, source))
        else:
            texts.append(_mapping_pass(net.mapping[number - 1], source))
    return "\n".join(texts)


def _header(about: Description, name: str, scale: int) -> str:
    """What a person who opens the file should know. Players skip all before the first directive."""
    steps = f", {plural(about.steps, 'step')}" if about.steps is not None else ""
    filtered = f"hwupload,libplacebo=w=iw*{scale}:h=ih*{scale}:custom_shader_path={name},hwdownload"
    lines = [
        f"{MARK.removeprefix('// ')} {about.network} x{scale}, which enlarges the luma of video",
        "",
        f"Method:     {about.method}{steps}",
        f"Run:        {about.run or UNKNOWN}",
        f"Trained on: {about.data}",
        f"Licence:    {about.licence} (of these weights)",
        "",
        f"mpv:    mpv --glsl-shaders={name} VIDEO",
        f"        or, in mpv.conf: glsl-shaders=~~/shaders/{name}",
        f"ffmpeg: ffmpeg -init_hw_device vulkan -i VIDEO -vf format=yuv420p,{filtered},format=yuv420p OUT",
        f"It runs where the picture is shown more than {_threshold(scale)} times as large as the video, and is skipped",
        "elsewhere. It needs compute shaders (OpenGL 4.3, Vulkan, Direct3D 11).",
        "",
        "RGB sources (PNG, most other pictures, some screen recordings) have no luma plane: they skip this shader, and",
        "no player says so. Colour (chroma) is enlarged by the player.",
        "It was trained for luma of studio range (16 to 235), which nearly all video has; full range works, slightly",
        "worse.",
    ]
    # What the notes of a run say must neither end a comment nor look like a directive.
    words = ("".join(letter if letter.isprintable() else " " for letter in line) for line in lines)
    comments = [f"// {line}".rstrip().replace("//!", "// !") for line in words]
    # The same for programs; \\/ is how JSON may write a slash.
    comments += ["//", f"// {METADATA_KEY}: " + about.to_json().replace("//!", "/\\/!")]
    return "\n".join(comments) + "\n"


def _threshold(scale: int) -> str:
    return f"{scale / MAX_SHRINK:.3f}"


def _magic(description: str, scale: int, source: str | None, target: str | None, groups: int) -> str:
    """The directives of one pass: LUMA and `source` in, `target` out, or LUMA itself, enlarged."""
    across, down = min(groups, ACROSS), -(-groups // ACROSS)
    width, height = (across, down) if target else (scale, scale)
    least = _threshold(scale)
    lines = [f"DESC {description}", "HOOK LUMA", "BIND LUMA"]
    lines += [f"BIND {source}"] if source else []
    lines += [f"SAVE {target}", "COMPONENTS 4"] if target else ["COMPONENTS 1"]
    lines += [
        f"WIDTH LUMA.w {width} *",
        f"HEIGHT LUMA.h {height} *",
        f"WHEN OUTPUT.w LUMA.w / {least} > OUTPUT.h LUMA.h / {least} > *",
        f"COMPUTE {BLOCK * width} {BLOCK * height} {BLOCK} {BLOCK}",
    ]
    return "".join(f"//!{line}\n" for line in lines)


def _first_pass(net: Any) -> str:
    """5x5 to d channels, of which each group goes into the sums of the 1x1 convolution at once."""
    feature, shrinking = net.feature, net.shrinking
    weight, bias = _padded(feature[0], inputs=1)
    inner, inner_bias = _padded(shrinking[0])
    radius = weight.shape[-1] // 2
    places = _places(radius)
    lines = [f"float x{k} = luma(at + ivec2({x}, {y}), size);" for k, (x, y) in enumerate(places)]
    lines += _sums("s", inner_bias)
    lines.append("vec4 f;")
    for group in range(len(weight) // GROUP):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        lines.append(f"f = {_vector(bias[rows])};")
        lines += [f"f += {_vector(weight[rows, 0, y + radius, x + radius])} * x{k};" for k, (x, y) in enumerate(places)]
        lines.append(f"f = prelu(f, {_slope(feature[1])});")
        lines += _products("s", inner[:, rows, 0, 0], "f")
    lines += _stored("s", len(inner) // GROUP, shrinking[1])
    return _WITHIN + _LUMA + _PRELU + _hook([_RETURN_OUTSIDE, *lines])


def _mapping_pass(layer: Any, source: str) -> str:
    """3x3 from s to s channels."""
    weight, bias = _padded(layer[0])
    radius = weight.shape[-1] // 2
    lines = [*_sums("s", bias), "vec4 v;"]
    for x, y in _places(radius):
        for group in range(weight.shape[1] // GROUP):
            columns = slice(group * GROUP, (group + 1) * GROUP)
            lines.append(f"v = part({group}, at + ivec2({x}, {y}), size);")
            lines += _products("s", weight[:, columns, y + radius, x + radius], "v")
    lines += _stored("s", len(weight) // GROUP, layer[1])
    return _part(source, weight.shape[1] // GROUP) + _PRELU + _hook([_RETURN_OUTSIDE, *lines])


def _last_pass(net: Any, source: str) -> str:
    """1x1 to d channels, for a block and its border in shared memory; K'xK' to the sub-pixels; the bicubic image.

    As many groups of channels are held at once as shared memory has room for.
    """
    scale = int(net.scale)
    expand, expand_bias = _padded(net.expanding[0])
    weight, bias = _padded(net.upsampling.conv, outputs=1)
    radius = weight.shape[-1] // 2
    side = BLOCK + 2 * radius
    count = len(expand) // GROUP
    held = min(count, SHARED_BYTES // (side * side * 4 * GROUP))
    width = _sub_width(scale)
    inputs = expand.shape[1] // GROUP
    lines = [f"ivec2 corner = ivec2(gl_WorkGroupID.xy) * {BLOCK} - {radius};"]
    lines.append(
        f"int here = (int(gl_LocalInvocationID.y) + {radius}) * {side} + int(gl_LocalInvocationID.x) + {radius};"
    )
    lines += _sums("a", bias, width)
    lines.append("vec4 v;")
    for first in range(0, count, held):
        chunk = range(first, min(first + held, count))
        lines += ["barrier();"] if first else []
        lines += _expanded(expand, expand_bias, _slope(net.expanding[1]), chunk, side, inputs)
        for slot, group in enumerate(chunk):
            columns = slice(group * GROUP, (group + 1) * GROUP)
            for x, y in _places(radius):
                products = _products("a", weight[:, columns, y + radius, x + radius], "v", width)
                if products:  # a transposed convolution as sub-pixels has zeros
                    lines += [f"v = held[{slot}][here + {y * side + x}];", *products]
    if net.global_skip == "bicubic":
        lines += _bicubic(scale, width)
    lines.append(_RETURN_OUTSIDE)
    for index in range(scale * scale):
        value, place = f"a{index // width}.{'xyzw'[index % width]}", f"ivec2({index % scale}, {index // scale})"
        lines.append(f"imageStore(out_image, at * {scale} + {place}, vec4({value}, 0.0, 0.0, 1.0));")
    shared = f"shared vec4 held[{held}][{side * side}];\n\n"
    mirrored = _MIRRORED if net.global_skip == "bicubic" else ""
    return shared + _part(source, inputs) + mirrored + _PRELU + _hook(lines)


def _expanded(weight: Weights, bias: Weights, slope: str, chunk: range, side: int, inputs: int) -> list[str]:
    """Groups `chunk` of the expanded features into shared memory: zero outside the image, where the network pads."""
    lines = [f"for (int i = int(gl_LocalInvocationIndex); i < {side * side}; i += {BLOCK * BLOCK}) {{"]
    lines.append(f"    ivec2 p = corner + ivec2(i % {side}, i / {side});")
    lines += [f"    vec4 s{group} = part({group}, p, size);" for group in range(inputs)]
    for slot, group in enumerate(chunk):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        lines.append(f"    vec4 e{slot} = {_vector(bias[rows])};")
        for column in range(inputs):
            part = weight[rows, column * GROUP : (column + 1) * GROUP, 0, 0]
            lines += [f"    e{slot} += {_matrix(part)} * s{column};"]
        lines.append(f"    held[{slot}][i] = within(p, size) ? prelu(e{slot}, {slope}) : vec4(0.0);")
    return [*lines, "}", "barrier();"]


def _bicubic(scale: int, width: int) -> list[str]:
    """MATLAB's bicubic enlargement, added to the sums a0, a1, ...: rows first, then columns."""
    reach = range(-REACH, REACH + 1)
    lines = []
    for y in reach:
        texels = [f"beyond(at + ivec2({x}, {y}), size)" for x in reach]
        lines += [f"vec4 r{y + REACH} = vec4({', '.join(texels[:4])});", f"float q{y + REACH} = {texels[4]};"]
    lines += ["vec4 r;", "float q;"]
    taps = np.zeros((scale, 2 * REACH + 1), np.float32)
    for phase, (first, weights) in enumerate(kernel_phases(scale)):
        taps[phase, first + REACH : first + REACH + len(weights)] = weights
    for row in range(scale):
        used = np.flatnonzero(taps[row])
        for sums in ("r", "q"):
            lines.append(f"{sums} = {' + '.join(f'{_number(taps[row, k])} * {sums}{k}' for k in used)};")
        for column in range(scale):
            index = row * scale + column
            dot = f"dot({_vector(taps[column, :4])}, r) + {_number(taps[column, 4])} * q"
            lines.append(f"a{index // width}.{'xyzw'[index % width]} += {dot};")
    return lines


# --- pieces of GLSL

_RETURN_OUTSIDE = "if (any(greaterThanEqual(at, size))) return;"


def _hook(lines: Sequence[str]) -> str:
    start = ["ivec2 size = ivec2(LUMA_size);", "ivec2 at = ivec2(gl_GlobalInvocationID.xy);"]
    return "\nvoid hook() {\n" + "".join(f"    {line}\n" for line in (*start, *lines)) + "}\n"


def _part(texture: str, groups: int) -> str:
    return _WITHIN + _PART.format(texture=texture, across=min(groups, ACROSS))


def _places(radius: int) -> list[tuple[int, int]]:
    """(x, y) of a kernel's taps, row by row."""
    reach = range(-radius, radius + 1)
    return [(x, y) for y in reach for x in reach]


def _sub_width(scale: int) -> int:
    """Sub-pixels in one vector: a row of them at x3 and x4, all four at x2."""
    return GROUP if scale * scale % GROUP == 0 else scale


def _groups(channels: int) -> int:
    return -(-channels // GROUP)


def _padded(layer: Any, *, inputs: int = GROUP, outputs: int = GROUP) -> tuple[Weights, Weights]:
    """Weight `[out, in, K, K]` and bias `[out]` of a convolution, filled up with zeros to multiples of channels."""
    weight = layer.weight.detach().to(torch.float32).cpu().numpy()
    bias = layer.bias.detach().to(torch.float32).cpu().numpy()
    more_out, more_in = -len(weight) % outputs, -weight.shape[1] % inputs
    return np.pad(weight, ((0, more_out), (0, more_in), (0, 0), (0, 0))), np.pad(bias, (0, more_out))


def _sums(name: str, bias: Weights, width: int = GROUP) -> list[str]:
    """Vectors name0, name1, ... that begin as the bias."""
    return [
        f"vec{width} {name}{number} = {_vector(bias[number * width : (number + 1) * width])};"
        for number in range(len(bias) // width)
    ]


def _products(name: str, weight: Weights, vector: str, width: int = GROUP) -> list[str]:
    """Add `weight` `[outputs, 4]` times `vector` to the sums name0, name1, ... (nothing where all weights are zero)."""
    lines = []
    for number in range(len(weight) // width):
        block = weight[number * width : (number + 1) * width]
        rows = np.flatnonzero(block.any(axis=1))
        if len(rows) == 1:
            lines.append(f"{name}{number}.{'xyzw'[rows[0]]} += dot({_vector(block[rows[0]])}, {vector});")
        elif len(rows):
            lines.append(f"{name}{number} += {_matrix(block)} * {vector};")
    return lines


def _stored(name: str, groups: int, prelu: nn.Module) -> list[str]:
    """The sums, activated, at their places side by side."""
    across = min(groups, ACROSS)
    slope = _slope(prelu)
    return [
        f"imageStore(out_image, at + ivec2({group % across}, {group // across}) * size, prelu({name}{group}, {slope}));"
        for group in range(groups)
    ]


def _slope(prelu: Any) -> str:
    return _number(prelu.weight.detach().to(torch.float32).item())


def _matrix(weight: Weights) -> str:
    """`[outputs, 4]` as GLSL has it: 4 columns, one for each input."""
    outputs = len(weight)
    kind = "mat4" if outputs == GROUP else f"mat4x{outputs}"
    return f"{kind}({', '.join(_number(value) for value in weight.T.ravel())})"


def _vector(values: Weights) -> str:
    return f"vec{len(values)}({', '.join(_number(value) for value in values)})"


def _number(value: float | np.float32) -> str:
    """The shortest decimal that is this float32, with a point, as GLSL wants it."""
    text = str(np.float32(value))
    mantissa, e, exponent = text.partition("e")
    return (mantissa if "." in mantissa else f"{mantissa}.0") + e + exponent

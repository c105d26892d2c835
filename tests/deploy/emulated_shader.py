"""A user shader without a GPU: its text, pass by pass and work group by work group, in float64.

Knows only what our shaders say. The functions in front of `hook` (texels, borders, activation) are written anew here.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_DIRECTIVE = re.compile(r"//!(\w+) ?(.*)")
_OPERATIONS = {"*": operator.mul, "/": operator.truediv, ">": operator.gt}
_TYPES = r"(?:float|int|i?vec[234])"


@dataclass
class Pass:
    """One pass: its directives, a list of values each, and its text."""

    directives: dict[str, list[str]] = field(default_factory=dict)
    body: str = ""

    def __getitem__(self, name: str) -> str:
        (value,) = self.directives[name]
        return value


def passes_of(text: str) -> list[Pass]:
    """As players read a file: what comes before the first directive is skipped."""
    passes: list[Pass] = []
    for line in text[text.index("//!") :].splitlines():
        if match := _DIRECTIVE.match(line):
            if not passes or passes[-1].body:
                passes.append(Pass())
            passes[-1].directives.setdefault(match[1], []).append(match[2])
        else:
            assert "//!" not in line
            passes[-1].body += line + "\n"
    return passes


def rpn(expression: str, sizes: dict[str, tuple[int, int]]) -> float:
    """A size or a condition, in reverse Polish notation; `sizes` are (width, height)."""
    stack: list[float] = []
    for word in expression.split():
        if word in _OPERATIONS:
            right, left = stack.pop(), stack.pop()
            stack.append(_OPERATIONS[word](left, right))
        elif word[-2:] in (".w", ".h"):
            stack.append(sizes[word[:-2]]["wh".index(word[-1])])
        else:
            stack.append(float(word))
    (value,) = stack
    return value


def emulate(text: str, luma: np.ndarray, output: tuple[int, int]) -> np.ndarray:
    """What becomes of the plane `[H, W]` that is shown with `output` = (height, width) pixels."""
    textures = {"LUMA": luma[None].astype(np.float64)}
    for step in passes_of(text):
        sizes = {name: (texture.shape[2], texture.shape[1]) for name, texture in textures.items()}
        sizes["OUTPUT"] = output[::-1]
        assert step["HOOK"] == "LUMA"
        if not rpn(step["WHEN"], sizes):
            continue
        shape = int(step["COMPONENTS"]), int(rpn(step["HEIGHT"], sizes)), int(rpn(step["WIDTH"], sizes))
        bound = {name: textures[name] for name in step.directives["BIND"]}
        target = step.directives.get("SAVE", ["LUMA"])[0]
        textures[target] = _run(step, bound, shape)
    return textures["LUMA"][0]


def _run(step: Pass, bound: dict[str, np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
    block_x, block_y, threads_x, threads_y = map(int, step["COMPUTE"].split())
    image = np.full(shape, np.nan)
    code = compile(_translated(step.body), step["DESC"], "exec")
    held = re.search(r"shared vec4 held\[(\d+)\]\[(\d+)\];", step.body)
    for row in range(math.ceil(shape[1] / block_y)):
        for column in range(math.ceil(shape[2] / block_x)):
            y, x = (axis.ravel() for axis in np.mgrid[:threads_y, :threads_x])
            names = _functions(step, bound, image)
            names["gl_WorkGroupID"] = _Vector([[column], [row]])
            names["gl_LocalInvocationID"] = _Vector([x, y])
            names["gl_GlobalInvocationID"] = _Vector([x + column * threads_x, y + row * threads_y])
            if held:
                names["held"] = np.full((int(held[1]), 4, int(held[2])), np.nan)
            exec(code, names)
    return image


class _Vector(np.ndarray):
    """`[components, threads]`."""

    def __new__(cls, parts: Any) -> _Vector:
        return np.stack(np.broadcast_arrays(*map(np.atleast_1d, parts))).view(cls)

    xy = property(lambda self: self)
    x = property(lambda self: self[0])
    y = property(lambda self: self[1])
    z = property(lambda self: self[2])
    w = property(lambda self: self[3])


class _Matrix:
    """Columns first, as GLSL has them."""

    def __init__(self, columns: int, *values: float) -> None:
        self.columns = np.array(values).reshape(columns, -1)

    def __mul__(self, vector: np.ndarray) -> np.ndarray:
        return (self.columns.T @ vector).view(_Vector)


def _functions(step: Pass, bound: dict[str, np.ndarray], image: np.ndarray) -> dict[str, Any]:
    plane = bound["LUMA"][0]
    height, width = plane.shape

    def within(p: np.ndarray) -> np.ndarray:
        return (p[0] >= 0) & (p[1] >= 0) & (p[0] < width) & (p[1] < height)

    def luma(p: np.ndarray) -> np.ndarray:
        return np.where(within(p), plane[p[1].clip(0, height - 1), p[0].clip(0, width - 1)], 0.0)

    def part(group: int, p: np.ndarray) -> np.ndarray:
        (source,) = (texture for name, texture in bound.items() if name != "LUMA")
        across = source.shape[2] // width
        top, left = group // across * height, group % across * width
        texels = source[:, top : top + height, left : left + width]
        return np.where(within(p), texels[:, p[1].clip(0, height - 1), p[0].clip(0, width - 1)], 0.0).view(_Vector)

    def beyond(p: np.ndarray) -> np.ndarray:
        rows, columns = (np.pad(np.arange(side), 40, mode="symmetric") for side in (height, width))
        return plane[rows[p[1] + 40], columns[p[0] + 40]]

    def store(place: np.ndarray, value: np.ndarray, inside: np.ndarray) -> None:
        x, y = place[:, inside]
        assert np.isnan(image[:, y, x]).all()  # nothing is written twice
        image[:, y, x] = np.broadcast_to(value, (4, len(inside)))[: len(image), inside]

    return {
        "within": within,
        "luma": luma,
        "part": part,
        "beyond": beyond,
        "store": store,
        "LUMA_size": _Vector([width, height]),
        "prelu": lambda v, slope: np.where(v > 0, v, slope * v).view(_Vector),
        "dot": lambda a, b: (a * b).sum(0),
        "mat4": lambda *values: _Matrix(4, *values),
        "mat4x3": lambda *values: _Matrix(4, *values),
        **{f"vec{n}": lambda *parts, n=n: _Vector(parts * n if len(parts) == 1 else parts) for n in (2, 3, 4)},
        "ivec2": lambda *parts: parts[0] if len(parts) == 1 else _Vector(parts),
        "int": lambda value: value,
        "arange": np.arange,
        "where": np.where,
        "added": _added,
    }


def _added(vector: np.ndarray, component: int, value: np.ndarray) -> np.ndarray:
    vector = np.broadcast_to(vector, (len(vector), max(vector.shape[1], len(value)))).copy().view(_Vector)
    vector[component] += value
    return vector


def _translated(body: str) -> str:
    """`hook` in Python, all threads of a work group at once. What is left of GLSL would be no Python."""
    lines = []
    shared = "barrier"  # what was done last with shared memory
    for raw in body.split("void hook() {\n")[1].rstrip().removesuffix("}").splitlines():
        line = raw.strip()
        use = "write" if line.startswith("held[") else "read" if "held[" in line else shared
        assert "barrier" in (shared, use) or use == shared, "threads read what others still write"
        shared = "barrier" if line == "barrier();" else use
        if line in ("}", "barrier();") or re.fullmatch(_TYPES + r" \w+;", line):
            continue
        line = re.sub(rf"^{_TYPES} (?=\w+ =)", "", line).removesuffix(";")
        line = line.replace("if (any(greaterThanEqual(at, size))) return", "inside = (at < size).all(0)")
        line = line.replace(", size)", ")")
        line = re.sub(
            r"^for \(int i = int\(gl_LocalInvocationIndex\); i < (\d+); i \+= 256\) {", r"i = arange(\1)", line
        )
        line = line.replace("i / ", "i // ")
        line = re.sub(
            r"^(\w+)\.([xyzw]) \+= (.+)", lambda m: f"{m[1]} = added({m[1]}, {'xyzw'.index(m[2])}, {m[3]})", line
        )
        line = re.sub(r"^(\w+) \+= (.+)", r"\1 = \1 + \2", line)
        line = re.sub(r"held\[(\d+)\]\[([^]]+)\]", r"held[\1][:, \2]", line)
        line = re.sub(r"= (within\(p\)) \? (.+) : (.+)", r"= where(\1, \2, \3)", line)
        line = re.sub(r"^imageStore\(out_image, (.+)\)$", r"store(\1, inside)", line)
        lines.append(line)
    return "\n".join(lines)

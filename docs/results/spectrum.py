"""What a linear classifier on radial spectra can see: `python docs/results/spectrum.py FOLDER [--photographs 40] ...`.

Photographs of FOLDER against the same ones degraded, half of the photographs to learn from and half to be judged by,
both versions of one on the same side. The classifier sees what FESD's can be shown (`method.spectrum`): the image
shrunk to a quarter by areas, or a piece of that size, in the middle or drawn. Prints Markdown: held-out accuracy, and
how much the classifier's opinion of a *map* changes when the map's own upper band is lost: L_spectral's use of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, optimize

from hpcdistill.ops.crops import cut
from hpcdistill.ops.radial_spectrum import radial_spectrum
from hpcdistill.ops.repeatable import resize

Array = NDArray[np.float64]
PENALTY = 1e-3  # on the squared weights of the standardised profile


def nearest(images: Array) -> Array:
    """Halved by areas, then every pixel twice."""
    batch, height, width, channels = images.shape
    small = images.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return small.repeat(2, axis=1).repeat(2, axis=2)


def blurred(deviation: float) -> Callable[[Array], Array]:
    return lambda images: ndimage.gaussian_filter(images, (0, deviation, deviation, 0), mode="reflect")


DEGRADED = {"nearest x2": nearest, "blur 0.6": blurred(0.6), "blur 1.0": blurred(1.0)}


def as_images(pixels: Array) -> torch.Tensor:
    """[N, H, W, 3] of levels, rounded to 8 bits, to [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.clip(np.round(pixels), 0, 255).transpose(0, 3, 1, 2).copy()) / 127.5 - 1


def seen(images: torch.Tensor, reading: str, places: NDArray[np.int64]) -> Array:
    """[N, rings]: the profiles of one look at each image."""
    side = images.shape[2] // 4
    if reading == "shrunk":
        return radial_spectrum(resize(images, side, side, "area")).numpy()
    if reading == "middle":
        places = np.full_like(places, (images.shape[2] - side) // 2)
    top, left = torch.from_numpy(places).unbind(1)
    return radial_spectrum(cut(images, side, top, left)).numpy()


def fitted(profiles: Array, real: Array) -> tuple[Array, float]:
    """Weights and bias of a logistic regression on standardised profiles, as they apply to the profiles themselves."""
    mean, deviation = profiles.mean(0), profiles.std(0) + 1e-12
    inputs, sign = (profiles - mean) / deviation, 2 * real - 1

    def loss(parameters: Array) -> tuple[float, Array]:
        weights = parameters[:-1]
        margin = sign * (inputs @ weights + parameters[-1])
        slope = -sign * np.exp(-np.logaddexp(0, margin)) / len(sign)
        value = np.logaddexp(0, -margin).mean() + PENALTY * weights @ weights / 2
        return value, np.append(inputs.T @ slope + PENALTY * weights, slope.sum())

    found = optimize.minimize(loss, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weights = found[:-1] / deviation
    return weights, float(found[-1] - weights @ mean)


def one_seed(images: torch.Tensor, degraded: torch.Tensor, reading: str, looks: int, seed: int) -> tuple[float, float]:
    """Held-out accuracy, and the share of a map's change that the classifier's opinion shows."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    side, count = images.shape[2] // 4, len(images)
    profiles = []
    for _ in range(looks):
        places = generator.integers(0, images.shape[2] - side + 1, (count, 2))
        profiles.append((seen(images, reading, places), seen(degraded, reading, places)))
    learn, judge = order[: count // 2], order[count // 2 :]
    inputs = np.concatenate([version[learn] for look in profiles for version in look])
    real = np.tile(np.repeat([1.0, 0.0], len(learn)), looks)
    weights, bias = fitted(inputs, real)
    right = [np.mean((version[judge] @ weights + bias > 0) == k) for k, version in enumerate(reversed(profiles[0]))]
    # SC's weight has norm 1. A map is stood in for by the shrunk image, its lost band by a blur of its own pixels.
    maps = resize(images, side, side, "area")
    lost = torch.from_numpy(ndimage.gaussian_filter(maps.numpy(), (0, 0, 1.0, 1.0), mode="reflect"))
    change = (radial_spectrum(maps) - radial_spectrum(lost)).numpy()[judge]
    shares = np.abs(change @ (weights / np.linalg.norm(weights))) / np.linalg.norm(change, axis=1)
    return float(np.mean(right)), float(shares.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="photographs of one square size, in file order")
    parser.add_argument("--photographs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=20, help="0, 1, ...: the split, and where pieces are cut")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(file for file in options.folder.iterdir() if file.is_file())[: options.photographs]
    if len(files) < options.photographs:
        raise SystemExit(f"error: {options.folder}: {len(files)} files; give a folder of {options.photographs}")
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float64) for file in files])
    images = as_images(pixels)
    readings = {"shrunk": ("shrunk", 1), "middle piece": ("middle", 1), "drawn piece": ("drawn", 1)}
    readings["16 drawn pieces"] = ("drawn", 16)
    lines: list[list[str]] = [[], []]
    for name, degrade in DEGRADED.items():
        degraded = as_images(degrade(pixels))
        found = {
            title: [one_seed(images, degraded, reading, looks, seed) for seed in range(options.seeds)]
            for title, (reading, looks) in readings.items()
        }
        for number in (0, 1):
            cells = [spread([values[number] for values in each]) for each in found.values()]
            lines[number].append(f"| {name} | " + " | ".join(cells) + " |")
    for title, rows in zip(("held-out accuracy", "share of a map's change"), lines, strict=True):
        head = f"| {title} | " + " | ".join(readings) + " |"
        sys.stdout.write("\n".join([head, "|---|" + "---:|" * len(readings), *rows]) + "\n\n")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()

"""Perceptual distillation: style (equation 10) and feature (equation 11), on VGG16's maps of two images.

Both are sums over the layers of MEAN absolute differences, in float32 or better. Detach the teacher's maps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpcdistill.losses.supervision import check_same_shape, l1
from hpcdistill.ops.gram import gram

Maps = Mapping[str, Tensor]


def style(maps_student: Maps, maps_teacher: Maps) -> Tensor:
    """Sum over layers of mean |Gram(S) - Gram(T)| (0-dim); layer -> `[B, C, H, W]`, the same layers in both."""
    distances = []
    for student, teacher in pairs(maps_student, maps_teacher):
        check_same_shape(student, teacher)  # the Grams of maps of different sizes would have one shape
        distances.append(l1(gram(student), gram(teacher)))
    return torch.stack(distances).sum()


def feature(maps_student: Maps, maps_teacher: Maps) -> Tensor:
    """Sum over layers of mean |S - T| (0-dim); layer -> `[B, C, H, W]`, the same layers in both."""
    return torch.stack([l1(student, teacher) for student, teacher in pairs(maps_student, maps_teacher)]).sum()


def pairs(maps_student: Maps, maps_teacher: Maps) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) of each layer; ValueError unless both have the same layers, one at least."""
    if not maps_student or maps_student.keys() != maps_teacher.keys():
        raise ValueError(
            f"the same layers are compared, one at least; the student has {sorted(maps_student)}, "
            f"the teacher {sorted(maps_teacher)}"
        )
    return [(maps_student[name], maps_teacher[name]) for name in maps_student]

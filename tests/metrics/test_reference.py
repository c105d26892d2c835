"""Bicubic enlargement beside a run's numbers: found by the metric's test set, and the first to say who is below it."""

from __future__ import annotations

import math

from hpcdistill.metrics.reference import below_bicubic, bicubic_value

RESULT = {
    "best": {"step": 5, "metrics": {"student/set5/psnr": 28.0, "student/set5/ssim": 0.7, "teacher/set5/psnr": 30.0}},
    "last": {"step": 9, "metrics": {"student/set5/psnr": 28.418, "student/new/psnr": 1.0, "teacher/set5/psnr": None}},
    "bicubic": {"set5": {"psnr": 28.42, "ssim": 0.81}},
}


def test_the_number_of_the_same_test_set() -> None:
    assert bicubic_value(RESULT, "student/set5/psnr") == bicubic_value(RESULT, "teacher/set5/psnr") == 28.42
    assert bicubic_value(RESULT, "student/set5/ssim") == 0.81
    for metric in ("student/set14/psnr", "student/set5/lpips", "psnr", ""):
        assert bicubic_value(RESULT, metric) is None
    for damaged in (None, 3, {"set5": 3}, {"set5": {"psnr": True}}, {"set5": {"psnr": math.nan}}):
        assert bicubic_value({"bicubic": damaged}, "student/set5/psnr") is None


def test_who_is_below_it() -> None:
    assert below_bicubic(RESULT) == ["student on set5: 0.42 dB below bicubic (28.00 against 28.42 dB)"]
    assert below_bicubic(RESULT, "last") == []  # by less than a table shows; without bicubic; without a number
    assert below_bicubic({"best": None}) == below_bicubic({}) == []

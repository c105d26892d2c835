"""The benchmark command: the published costs, what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdistill.benchmark import main
from hpcdistill.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PIXELS = 1280 * 720
# MACs of FSRCNN's layers before the last, at each LR pixel.
BODY = 25 * 56 + 56 * 12 + 4 * 9 * 12 * 12 + 12 * 56


def costs(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, int]]:
    """What `cost ... --json` prints: one JSON object on one line, of integers, and nothing else."""
    assert main(["cost", *arguments, "--json"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    report = json.loads(text)
    assert all(type(value) is int for network in report.values() for value in network.values())
    return report


@pytest.mark.parametrize(("scale", "macs", "true_macs"), [(2, 6.007, 2.872), (3, 4.992, 1.276), (4, 4.637, 0.718)])
@pytest.mark.parametrize("method", ["dssd", "pisr", "fsrcnn"])
def test_student_costs_what_the_paper_prints(
    capsys: pytest.CaptureFixture[str], method: str, scale: int, macs: float, true_macs: float
) -> None:
    report = costs(capsys, str(CONFIGS / method / f"x{scale}.yaml"))
    assert list(report) == (["student"] if method == "fsrcnn" else ["student", "teacher"])
    assert report["student"] == {
        "params": 12_644,
        "macs": PIXELS // scale**2 * BODY + PIXELS * 81 * 56,
        "true_macs": PIXELS // scale**2 * (BODY + 81 * 56),
    }
    assert round(report["student"]["macs"] / 1e9, 3) == macs
    assert round(report["student"]["true_macs"] / 1e9, 3) == true_macs


def test_teachers(capsys: pytest.CaptureFixture[str]) -> None:
    # DSSD's encoder twice and PISR's once, by hand: c -> 56 at full size, the rest at half or a quarter of each side.
    hfrm = PIXELS * (9 * 56 + (9 * 56 * 56 + 9 * 56 * 12 + 9 * 12) // 4) * 5 // 4
    pisr = PIXELS * 25 * 56 + PIXELS // 16 * (25 * 56 * 56 + 9 * 56 * 12 + 9 * 12)
    for folder, params, encoder in (("dssd", 82_668, hfrm), ("pisr", 86_084 + 12_644, pisr)):
        report = costs(capsys, str(CONFIGS / folder / "x4.yaml"))
        student, teacher = report["student"], report["teacher"]
        assert teacher["params"] == params
        assert teacher["macs"] == encoder + student["macs"]
        assert teacher["true_macs"] == encoder + student["true_macs"]
        assert costs(capsys, str(CONFIGS / folder / "teacher_x4.yaml")) == {"teacher": teacher}


def test_variants_and_overrides_reach_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    dssd, variants = str(CONFIGS / "dssd" / "x4.yaml"), CONFIGS / "variants"
    assert costs(capsys, dssd, str(variants / "tied-sdm.yaml"))["teacher"]["params"] == 47_656
    rgb = costs(capsys, dssd, str(variants / "rgb.yaml"))
    assert rgb["student"]["params"] == 24_518
    # HFRM and SDM: two more channels in the first and in the last convolution each
    assert rgb["teacher"]["params"] == 24_518 + 2 * (35_012 + 2 * 9 * 56 + 2 * 9 * 12 + 2)
    alone = costs(capsys, dssd, "teacher=null", "method.initialise=random", "method.vid=none")
    assert list(alone) == ["student"]
    # The bicubic encoder has no weights, and its teacher is FSRCNN from LR on.
    bicubic = costs(capsys, dssd, str(variants / "encoder-bicubic.yaml"))
    assert bicubic["teacher"]["true_macs"] == bicubic["student"]["true_macs"] == PIXELS // 16 * (BODY + 81 * 56)


@pytest.mark.parametrize(
    ("network", "more", "params", "macs"),
    [
        ("vdsr", (), 664_704, 612.6),
        ("idn", (), 552_769, 47.7),
        ("idn", ("rgb.yaml",), 590_915, 81.9),
    ],
)
def test_networks_of_table_4(
    capsys: pytest.CaptureFixture[str], network: str, more: tuple[str, ...], params: int, macs: float
) -> None:
    variants = [str(CONFIGS / "variants" / name) for name in (f"network-{network}.yaml", *more)]
    plain = costs(capsys, str(CONFIGS / "fsrcnn" / "x4.yaml"), *variants)
    assert list(plain) == ["student"]
    assert plain["student"]["params"] == params
    assert round(plain["student"]["macs"] / 1e9, 1) == macs
    c = 3 if more else 1
    hfrm, pisr = (
        9 * c * 56 + 9 * 56 * 56 + 9 * 56 * 12 + 9 * 12 * c + 56 + 56 + 12 + c + 3,
        25 * c * 56 + 25 * 56 * 56 + 9 * 56 * 12 + 9 * 12 * c + 56 + 56 + 12 + c + 3,
    )
    for folder, around in (("dssd", 2 * hfrm), ("pisr", pisr)):
        report = costs(capsys, str(CONFIGS / folder / "x4.yaml"), *variants)
        assert report["student"] == plain["student"]
        assert report["teacher"]["params"] == params + around
        assert report["teacher"]["macs"] > report["student"]["macs"]
    assert main(["cost", str(CONFIGS / "dssd" / "x4.yaml"), *variants]) == 0
    text = capsys.readouterr().out
    assert f"{params:,}" in text
    assert "6.0 G" not in text  # FSRCNN's


def test_table_says_the_rules_and_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(CONFIGS / "dssd" / "x4.yaml")]) == 0
    text = capsys.readouterr().out
    for expected in ("12,644", "4.637 G", "0.718 G", "82,668", "1280x720", "literature", "true", "6.0 G"):
        assert expected in text
    assert main(["cost", str(CONFIGS / "dssd" / "teacher_x4.yaml")]) == 0
    assert "6.0 G" not in capsys.readouterr().out  # printed for the student alone


@pytest.mark.parametrize(
    ("config", "params", "macs", "shown"),
    [
        (
            "horse2zebra",
            (137_347, 1_987_075, 11_378_179, 2_764_737),
            (1.408, 18.314, 56.799, 3.147),
            ("student: ResNetGenerator ", "  ngf 16, separable", "discriminator: PatchDiscriminator ", "0.955 G"),
        ),
        (
            "edges2shoes",
            (3_404_451, 54_413_955, 54_413_955, 11_042_433),
            (1.219, 18.140, 18.140, 12.572),
            ("student: UNetGenerator ", "0.406 G", "The paper prints 18.60 G for the U-Net"),
        ),
    ],
)
def test_fesd_as_its_table_1_prints(
    capsys: pytest.CaptureFixture[str],
    config: str,
    params: tuple[int, ...],
    macs: tuple[float, ...],
    shown: tuple[str, ...],
) -> None:
    file = str(CONFIGS / "fesd" / f"{config}.yaml")
    report = costs(capsys, file)
    assert list(report) == ["student", "teacher", "original", "discriminator"]
    assert tuple(network["params"] for network in report.values()) == params
    assert tuple(round(network["macs"] / 1e9, 3) for network in report.values()) == macs
    assert main(["cost", file]) == 0
    text = capsys.readouterr().out
    figures = [*(f"{number:,}" for number in params), *(f"{number:.3f} G" for number in macs)]
    for expected in (*figures, *shown, "one input image of 256x256;"):
        assert expected in text, expected
    for absent in ("1280x720", "A teacher's MACs", "18.60" if config == "horse2zebra" else "resnet"):
        assert absent not in text, absent


def test_as_a_command(tmp_path: Path) -> None:
    # From another folder and without the packed sets that the configuration names.
    command = [sys.executable, "-m", "hpcdistill.benchmark", "cost", str(CONFIGS / "fsrcnn" / "x2.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["student"]["params"] == 12_644
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["dssd/x5.yaml"], "dssd/x5.yaml", "x4.yaml"),
        (["dssd/x4.yaml", "method.scal=2"], "method.scal", "did you mean 'scale'"),
        (["dssd/x4.yaml", "method.scale=5"], "method.scale", "expected 2, 3 or 4"),
        (["dssd/x4.yaml", "method.layer=expand"], "method.layer", "did you mean 'expanding'"),
        (["dssd/x4.yaml", "method.network=edsr"], "method.network", "unknown network 'edsr'; did you mean 'vdsr'"),
        (["dssd/x4.yaml", "method.network=idn"], "its network is fsrcnn", "teacher.overrides.method.network=idn"),
        (["dssd/x4.yaml", "variants/network-vdsr.yaml", "method.layer=expanding"], "method.layer", "valid: conv1"),
        (["dssd/x4.yaml", "teacher=null"], "needs a teacher", "teacher.config"),
        (["dssd/x4.yaml", "method.name=fsrcnn"], "method.name", "plain_sr"),
        (["dssd/teacher_x2.yaml", "method.levels=2"], "levels is 2", "0 to 1"),
    ],
)
def test_one_line_for_what_is_wrong(arguments: list[str], named: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["cost", *(str(CONFIGS / argument) if argument.endswith(".yaml") else argument for argument in arguments)])
    assert "\n" not in str(caught.value)
    assert named in str(caught.value)
    assert remedy in str(caught.value)


def test_a_teacher_that_is_none(tmp_path: Path) -> None:
    config = tmp_path / "student.yaml"
    lines = [f"extends: {CONFIGS / 'dssd' / 'x4.yaml'}", f"teacher: {{config: {CONFIGS / 'fsrcnn' / 'x4.yaml'}}}"]
    config.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="teacher: is a FSRCNN; a privileged_student needs a privileged_teacher's run"):
        main(["cost", str(config)])


def test_no_command_and_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["costs"]):
        with pytest.raises(UserError, match=r"COMMAND.*; see hpcdistill benchmark --help"):
            main(arguments)
        assert capsys.readouterr().out == ""

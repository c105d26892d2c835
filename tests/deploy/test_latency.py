"""`benchmark latency`: every form runs and agrees with eager, times are what they say, and the papers' protocol."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import noise, write_set
from tiny_runs import packed_noise

from hpcdistill import benchmark
from hpcdistill.deploy.description import describe
from hpcdistill.deploy.formats import FORMATS
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.ncnn import Ncnn, NcnnSession
from hpcdistill.deploy.latency import comparison, paper
from hpcdistill.deploy.latency.comparison import Settings, compare
from hpcdistill.deploy.latency.memory import peak_memory
from hpcdistill.deploy.latency.subjects import Subject, find_subject
from hpcdistill.deploy.latency.timing import Timing, place_name, turns
from hpcdistill.deploy.latency.variants import Place, Unavailable, chosen_variants, prepare
from hpcdistill.deploy.model import load_network
from hpcdistill.errors import UserError
from hpcdistill.metrics.measured_cost import measured_cost, read_latency, save_latency
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import save_generator
from hpcdistill.ops.bicubic import upsample

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ENTRY = {"metric": "latency_ms", "kind": "cpu", "time": "2026-01-01", "mean_ms": 5.0, "median_ms": 4.0, "p95_ms": 9.0}


def network_file(folder: Path, name: str = "student", scale: int = 2) -> Path:
    torch.manual_seed(0)
    file = folder / "generators" / "best" / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_generator(FSRCNN(scale, d=4, s=2, m=1, residual="bicubic"), file)
    return file


def latency(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert benchmark.main(["latency", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_row_for_each_network_form_and_number_of_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(network_file(tmp_path))
    arguments = ("--threads", "1,2", "--variants", "bf16,eager", "--size", "12x9", "--rounds", "3", "--no-memory")
    report = latency(capsys, file, "pretrained:x3", *arguments)
    rows = [(row["model"], row["variant"], row["threads"]) for row in report["rows"]]
    expected = [(model, variant) for model in (file, "pretrained:x3") for variant in ("bf16", "eager")]
    assert sorted(rows) == sorted((*pair, count) for pair in expected for count in (1, 2))
    assert [row[:2] for row in rows] == [pair for pair in expected for _ in range(2)]  # as they were named
    for row in report["rows"]:
        assert row["input"] == [12, 9]
        assert row["output"] == ([24, 18] if row["model"] == file else [36, 27])
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(1000 / row["mean_ms"])
        assert (row["difference"] == 0) == (row["variant"] == "eager")
    assert torch.get_num_threads() == 1  # as before


def test_times_are_of_the_clock_and_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(wall=[0.001, 0.002, 0.003, 0.010], cpu=[0.001, 0.001, 0.002, 0.004])
    summary = timing.summary()
    # By hand: mean 16 / 4; median (2 + 3) / 2; p95 at 0.95 * 3 = 2.85 of the way: 3 + 0.85 * 7.
    assert summary["mean_ms"] == pytest.approx(4.0)
    assert summary["median_ms"] == pytest.approx(2.5)
    assert summary["p95_ms"] == pytest.approx(8.95)
    assert summary["images_per_second"] == pytest.approx(250.0)
    assert summary["cpu_median_ms"] == pytest.approx(1.5)
    assert summary["cpu_mean_ms"] == pytest.approx(2.0)
    for clock, shown in (("perf_counter", (10.0, 10.5)), ("process_time", (3.0, 3.25))):
        monkeypatch.setattr(time, clock, partial(next, iter(shown)))
    idle = Timing()
    assert idle.measure(lambda: "made", "cpu") == "made"
    assert (idle.wall, idle.cpu) == ([0.5], [0.25])


def test_turns_are_fair() -> None:
    rounds = list(turns("abc", 60))
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    followers = [(before, after) for turn in rounds for before, after in pairwise(turn)]
    assert min(followers.count((one, other)) for one in "abc" for other in "abc" if one != other) > 5
    assert rounds == list(turns("abc", 60))


def test_forms_agree_with_the_network_as_it_is_trained(tmp_path: Path) -> None:
    """Each form gives the bicubic image plus what the network, run by hand, adds."""
    subject = find_subject(str(network_file(tmp_path)))
    image = subject.example((8, 11))
    assert image.shape == (1, 1, 8, 11)
    assert 0 <= image.min() < 0.1 < 0.9 < image.max() <= 1
    network = FSRCNN(2, d=4, s=2, m=1)
    assert subject.network is not None
    network.load_state_dict(subject.network.state_dict())
    with torch.no_grad():
        given = torch.from_numpy(image).double()
        expected = upsample(given, 2) + network.double()(given)
    place = Place(image, "cpu", tmp_path)
    for variant, allowed in (("eager", 1e-6), ("channels_last", 1e-6), ("bf16", 0.05)):
        made = prepare(variant, subject, place)()
        assert (made.double() - expected).abs().max() < allowed, variant


@pytest.mark.parametrize(
    ("variant", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("ncnn", "pnnx")]
)
def test_runtimes_run_the_export(tmp_path: Path, variant: str, package: str) -> None:
    pytest.importorskip(package)
    pytest.importorskip(variant)
    subject = find_subject(str(network_file(tmp_path)))
    settings = Settings(("eager", variant), size=(10, 14), rounds=1, warm_ups=0, memory=False)
    _, row = compare([subject], settings)["rows"]
    assert row["variant"] == variant
    assert row["difference"] < 1e-4


def test_an_exported_file_is_measured_in_its_own_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network, about, _ = load_network(network_file(tmp_path))
    FORMATS["onnx"]().write(network, about, tmp_path / "n.onnx", Options())
    subject = find_subject(str(tmp_path / "n.onnx"))
    (row,) = compare([subject], Settings(size=(8, 8), rounds=1, memory=False))["rows"]
    assert (row["variant"], row["output"]) == ("onnxruntime", [16, 16])
    with pytest.raises(UserError, match=r"n\.onnx: the papers' protocol is of networks in PyTorch"):
        paper.measure_as_papers(subject, tmp_path)


def exported(folder: Path) -> Path:
    pytest.importorskip("ncnn")
    pytest.importorskip("pnnx")
    network, about, _ = load_network(network_file(folder))
    return Ncnn().write(network, about, folder / "n.param", Options())[0]


def test_an_exported_file_has_the_threads_that_its_row_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported(tmp_path)
    used: list[int] = []
    monkeypatch.setattr(
        NcnnSession, "__call__", lambda self, images: used.append(self.network.opt.num_threads) or np.zeros((1, 1))
    )
    rows = latency(
        capsys, str(file), "--threads", "2,3", "--size", "8x8", "--rounds", "1", "--warm-ups", "0", "--no-memory"
    )["rows"]
    assert [row["threads"] for row in rows] == [2, 3]
    assert list(dict.fromkeys(used)) == [2, 3]


def test_on_a_gpu_an_exported_file_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    subject = find_subject(str(exported(tmp_path)))
    (row,) = compare([subject], Settings(size=(8, 8), rounds=1, memory=False, device="cuda"))["rows"]
    assert row["unavailable"] == "is measured on the CPU alone; leave --device out"


def test_on_a_gpu_each_form_has_the_memory_that_it_takes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the forms that wait beside it. The allocator here is made up: 10 bytes a form, and 5 in a pass."""
    held, most = 100, 0

    def fake_prepare(variant: str, subject: Subject, place: Place) -> Any:
        nonlocal held
        held += 10 if place.device == "cuda" else 0

        def run() -> Any:
            nonlocal most
            most = max(most, held + 5)
            return np.zeros(1)

        return run

    def reset() -> None:
        nonlocal most
        most = held

    monkeypatch.setattr(comparison, "prepare", fake_prepare)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    subject = find_subject(str(network_file(tmp_path)))
    rows = compare([subject], Settings(("eager", "bf16"), size=(8, 8), rounds=1, device="cuda"))["rows"]
    assert [row["peak_bytes"] for row in rows] == [15, 15]


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile gives is what runs; where it fails, that is said. The compiler itself takes ten seconds."""
    subject = find_subject(str(network_file(tmp_path)))
    place = Place(subject.example((8, 8)), "cpu", tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda network: lambda image: network(image) + 1)
    plain = prepare("eager", subject, place)()
    assert torch.equal(prepare("compiled", subject, place)(), plain + 1)

    def failing(network: Any) -> Any:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(torch, "compile", lambda network: failing)
    with pytest.raises(Unavailable, match=r"torch\.compile: out of luck$"):
        prepare("compiled", subject, place)


def test_what_is_missing_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = find_subject(str(network_file(tmp_path)))
    place = Place(subject.example((8, 8)), "cpu", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler \(g\+\+\)"):
        prepare("compiled", subject, place)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unavailable, match="no GPU here"):
        prepare("cuda_graph", subject, place)
    monkeypatch.setitem(sys.modules, "hpcdistill.deploy.formats.onnx", None)
    with pytest.raises(Unavailable, match="onnx"):
        prepare("onnxruntime", subject, place)
    (row,) = compare([subject], Settings(("cuda_graph",), rounds=1, memory=False, size=(8, 8)))["rows"]
    assert row["unavailable"] == "no GPU here"


def test_memory_is_of_a_process_of_its_own(tmp_path: Path) -> None:
    """A 1024x1024 pass of four maps takes 16 MiB a map more than PyTorch alone, and not what is held here."""
    held = np.ones(1 << 29, np.uint8)
    file = network_file(tmp_path)
    alone = peak_memory({"variant": ""})
    taken = peak_memory({"file": str(file), "variant": "eager", "size": [1024, 1024], "threads": 1})
    assert alone is not None
    assert taken is not None
    assert 40 << 20 < taken - alone < held.nbytes


def test_the_peak_is_counted_anew() -> None:
    """In a process of its own: what other tests have left in this one may be more than what is freed here."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel counts no peaks here")
    script = (
        "import numpy as np; from hpcdistill.deploy.latency.memory import forget_peak, peak;"
        "np.ones(1 << 28, np.uint8).sum(); high = peak(); forget_peak(); print(high - peak())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1 << 27


def test_configurations_are_measured_untrained(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--variants", "eager", "--rounds", "1", "--warm-ups", "0", "--no-memory")
    report = latency(capsys, str(CONFIGS / "dssd" / "x3.yaml"), "method.network=fsrcnn", *arguments)
    (row,) = report["rows"]
    assert (row["network"], row["input"], row["output"]) == ("FSRCNN", [240, 427], [720, 1281])
    fesd = str(CONFIGS / "fesd" / "horse2zebra.yaml")
    (row,) = latency(capsys, fesd, *arguments, "--size", "32x32")["rows"]
    assert row["network"] == "ResNetGenerator"
    assert benchmark.main(["latency", fesd, *arguments, "--size", "32x32", "--generator", "original"]) == 0
    assert "untrained weights, which cost the same" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrained:x9"], "no such weights are shipped"),
        (["method.scale=2"], "and of which network"),
        (["pretrained:x4", "method.scale=2"], "is for configurations, and pretrained:x4 is none"),
        (["pretrained:x4", "--variants", "eager,chanels_last"], "did you mean 'channels_last'"),
        (["pretrained:x4", "--variants", ","], "is empty"),
        (["pretrained:x4", "--data", "x"], "--data: goes with --protocol paper"),
        (["pretrained:x4", "--protocol", "paper", "--size", "8x8"], "--size: the protocol says it"),
        (["pretrained:x4", "--protocol", "paper"], "names no test set; give one with --data SET"),
        (["pretrained:x4", "--warm-ups", "-1"], "give 0 or more"),
        ([str(CONFIGS / "fesd/horse2zebra.yaml"), "--size", "30x32"], "multiples of 4"),
        ([str(CONFIGS / "fesd/horse2zebra.yaml"), "--generator", "studnt"], "did you mean 'student'"),
        ([str(CONFIGS / "dssd/teacher_x2.yaml")], "no network that makes a picture of a picture"),
    ],
)
def test_one_line_for_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        benchmark.main(["latency", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        benchmark.main(["latency", "pretrained:x4", "--device", "cuda"])


def a_run(folder: Path, test_set: Path, **data: Any) -> Path:
    """The folder of a run of super-resolution, with the test set that it chose by."""
    network_file(folder)
    values = {"data": {"eval": {"other": "nowhere", "tiny": str(test_set)}, **data}, "eval": {"select": "tiny"}}
    (folder / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_dssd_runtime_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 1280x720 pixels, made of the run's own test images; kept beside what another device gave."""
    run = a_run(tmp_path / "run", packed_noise(tmp_path / "set", 2))
    about = {"network": "FSRCNN", "params": 1, "macs": 1}
    save_latency(run, "student", about, "A GPU", {**ENTRY, "kind": "cuda", "metric": "runtime_ms"})
    (entry,) = latency(capsys, str(run), "--protocol", "paper", "--rounds", "3", "--warm-ups", "1")
    assert (entry["metric"], entry["passes"], entry["images"], entry["of_images"]) == ("runtime_ms", 3, 2, 2)
    assert (entry["input"], entry["output"], entry["warm_ups"]) == ([360, 640], [720, 1280], 1)
    kept = read_latency(run)["student"]
    here = place_name("cpu", 1)
    assert list(kept["devices"]) == ["A GPU", here]
    assert kept["devices"][here]["mean_ms"] == entry["mean_ms"]
    # By hand: feature, shrinking, mapping, expanding, transposed 9x9; each PReLU has one slope.
    assert kept["params"] == (25 * 4 + 4) + (4 * 2 + 2) + (9 * 4 + 2) + (2 * 4 + 4) + (81 * 4 + 1) + 4
    assert kept["macs"] == 360 * 640 * (25 * 4 + 8 + 36 + 8) + 720 * 1280 * 81 * 4
    cost = measured_cost(run)  # a GPU's time counts before a CPU's
    assert cost.values["student/cost/runtime_ms"] == 5.0
    assert cost.devices == {"student/cost/runtime_ms": "A GPU"}
    assert cost.values["student/cost/params_k"] == kept["params"] / 1000


def test_the_protocol_warms_up_and_takes_each_image_once(tmp_path: Path) -> None:
    test_set = tmp_path / "set"
    write_set(test_set, "unpaired", [*({"a.png": noise(40, 50, n)} for n in range(3)), {"b.png": noise(30, 30, 9)}])
    generator = build_generator("resnet", ngf=4, blocks=1, channels_in=3, channels_out=3)
    seen: list[torch.Tensor] = []
    generator.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    values = {"data": {"crop": 32}}
    subject = Subject("toy", describe(generator, {}, tmp_path), generator, values=values)
    entry = paper.measure_as_papers(subject, test_set, warm_ups=2)
    assert (entry["metric"], entry["passes"], entry["warm_ups"]) == ("latency_ms", 3, 2)
    assert [tuple(image.shape) for image in seen] == [(1, 3, 32, 32)] * 5
    assert torch.equal(seen[0], seen[2])
    assert len({image.numpy().tobytes() for image in seen[2:]}) == 3
    assert min(image.min() for image in seen) < -0.5
    assert not generator.training


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "damaged"),
        ("[]", "expected an object"),
        ('{"student": {"macs": 1}}', "student: params"),
        (json.dumps({"student": {"params": 1, "macs": 1, "devices": {"x": {**ENTRY, "mean_ms": "5"}}}}), "mean_ms"),
        (json.dumps({"student": {"params": 1, "macs": 1, "devices": {"x": {**ENTRY, "kind": 1}}}}), "kind"),
        (json.dumps({"student": {"params": 1, "macs": 1, "devices": []}}), "expected an object"),
    ],
)
def test_a_damaged_record_is_one_line_and_not_written_over(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "latency.json"
    file.write_text(content, encoding="utf-8")
    damage = measured_cost(tmp_path).damage
    assert str(file) in damage
    assert why in damage
    assert "remove it" in damage
    assert "\n" not in damage
    with pytest.raises(UserError, match="damaged"):
        save_latency(tmp_path, "student", {"params": 1, "macs": 1}, "x", ENTRY)
    assert file.read_text(encoding="utf-8") == content


def test_the_newest_of_processors_counts(tmp_path: Path) -> None:
    about = {"params": 2_000_000, "macs": 3_000_000_000}
    save_latency(tmp_path, "student", about, "old", {**ENTRY, "time": "2026-01-02"})
    save_latency(tmp_path, "student", about, "older", {**ENTRY, "time": "2026-01-01", "mean_ms": 7.0})
    save_latency(tmp_path, "generator", about, "old", {**ENTRY, "mean_ms": 8.0})
    assert measured_cost(tmp_path).values == {
        "student/cost/latency_ms": 5.0,
        "student/cost/macs_G": 3.0,
        "student/cost/params_M": 2.0,
        "student/cost/params_k": 2000.0,
        "generator/cost/latency_ms": 8.0,
        "generator/cost/macs_G": 3.0,
        "generator/cost/params_M": 2.0,
        "generator/cost/params_k": 2000.0,
    }


def test_variants_by_name() -> None:
    assert chosen_variants("ncnn, eager,ncnn") == ("ncnn", "eager")
    assert chosen_variants(None)[0] == "eager"

"""ProgressBar without a terminal: a plain line every ten seconds, with counts, rate and the time left."""

from __future__ import annotations

import pytest

from hpcdistill.data import progress
from hpcdistill.data.progress import ProgressBar, megabytes


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_bytes_are_shown_in_mb(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("fetching a.zip", total=100_000_000, unit="bytes", done=20_000_000) as bar:
        clock.now += 5
        bar.advance(1_000_000)
        clock.now += 5
        bar.advance(19_000_000)  # 20 MB in 10 s, 60 MB to go
        clock.now += 10
        bar.restart(0, None)  # the server begins again and does not say how much there is
        clock.now += 4
        bar.advance(6_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "fetching a.zip: 40.0 MB of 100.0 MB, 2.0 MB/s, 0:00:30 left",
        "fetching a.zip: 6.0 MB, 1.5 MB/s",
    ]


def test_things_are_counted(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("packing", total=10, unit="images", done=4) as bar:
        bar.advance()
        clock.now += 10
        bar.advance(2)
    assert capsys.readouterr().err.splitlines() == ["packing: 7/10, 0.3 images/s, 0:00:10 left"]


def test_sizes_read_as_download_pages_give_them() -> None:
    assert [megabytes(n) for n in (116_867_962, 3_530_603_713, 0)] == ["116.9 MB", "3.53 GB", "0.0 MB"]

"""The train command on two ranks: what one of them alone sees or meets must not part it from the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranked_commands import Ranks

from hpcdistill import train, trainer
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.read.staging import StagingStopped
from hpcdistill.ranks.signals import EXIT_STOPPED
from hpcdistill.training.run_folder import RunFolder

pytestmark = pytest.mark.distributed
CLONE = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """One step on one image of noise."""
    (tmp_path / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "images/0.png")
    pack(load_recipe("folder"), tmp_path / "images", tmp_path / "packed")
    (tmp_path / "tiny.yaml").write_text(
        f"data: {{train: {tmp_path / 'packed'}, eval: {{}}, patch: 24, samples_per_epoch: 2, workers: 0}}\n"
        "train: {steps: 1, batch_size: 2, trackers: [], device: cpu, threads: 1, timeout: 20}\n"
    )
    return [str(CLONE / "configs/fsrcnn/x2.yaml"), str(tmp_path / "tiny.yaml"), f"runs={tmp_path / 'runs'}"]


def trained(command: list[str], folder: Path, change: Callable[[int], None]) -> tuple[list[int | None], str]:
    def main(rank: int, ranks: int) -> int:
        change(rank)
        return train.main(command)

    with Ranks(2, main, folder) as started:
        return started.codes(60), started.said(0)


@pytest.mark.parametrize("stopped", [0, 1])
def test_staging_that_stops_on_one_rank_stops_both(
    stopped: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_reader = trainer.open_reader

    def staged(rank: int) -> None:
        def opened(*arguments: Any) -> Any:
            if rank == stopped:
                raise StagingStopped
            return open_reader(*arguments)

        monkeypatch.setattr(trainer, "open_reader", opened)

    codes, said = trained(command, tmp_path / "first", staged)
    assert codes == [EXIT_STOPPED] * 2
    assert "stopped while staging; the same command goes on from here" in said
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/metrics.jsonl"))


@pytest.mark.parametrize("blind", [0, 1])
def test_rank_0_says_whether_a_run_has_finished(
    blind: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, _ = trained(command, tmp_path / "first", lambda rank: None)
    assert codes == [0, 0]
    result = RunFolder.result

    def looked(rank: int) -> None:
        monkeypatch.setattr(RunFolder, "result", lambda folder: None if rank == blind else result(folder))

    codes, said = trained(command, tmp_path / "second", looked)
    assert codes == [0, 0]
    assert ("has finished already" in said) == (blind == 1)

"""Shared fixtures: the optional real test data, and a CPU that computes the same on every machine."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; more threads only get in each other's way
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where a test takes two, they sleep while they wait for each other
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as hpcdistill does, where it comes before torch

# Where bytecode is not kept, every process that the tests start would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What is started in the background by a script ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: each look through torch would take a tenth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 with random weights, 60 MB, in a file: written once."""
    from translation import write_vgg

    return write_vgg(tmp_path_factory.mktemp("vgg") / "random.safetensors")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images named by HPCDISTILL_TEST_DATA; tests that need it skip without."""
    folder = os.environ.get("HPCDISTILL_TEST_DATA")
    if not folder:
        pytest.skip("HPCDISTILL_TEST_DATA is not set")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"HPCDISTILL_TEST_DATA={folder} is not a folder")
    return path

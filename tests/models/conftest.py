"""The random models, and what every test of them needs."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other projects' deprecations are not this one's errors
    from tests.models.random_models import SHAPES, write_model
from tests.models import parity
from tests.models import random_chronos as chronos
from tests.models.ours import RandomModel


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tiny products gain nothing from a second thread, and on a busy machine threads that wait for each other cost
    tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=SHAPES)
def model(request, random_model) -> RandomModel:
    """Each of the random models in turn."""
    return random_model(request.param)


@pytest.fixture(scope="session")
def random_model(probe, tmp_path_factory):
    """random_model(name): one of SHAPES, drawn once a session."""
    drawn: dict[str, RandomModel] = {}

    def draw(name: str) -> RandomModel:
        if name not in drawn:
            folder = write_model(SHAPES[name], tmp_path_factory.mktemp("models") / name)
            drawn[name] = RandomModel(name, folder, probe("stage_probe"))
        return drawn[name]

    return draw


@pytest.fixture(scope="session", params=chronos.SHAPES)
def chronos_model(request, random_chronos) -> chronos.RandomChronos:
    """Each of the random Chronos-2 models in turn."""
    return random_chronos(request.param)


@pytest.fixture(scope="session")
def random_chronos(tmp_path_factory):
    """random_chronos(name): one of random_chronos.SHAPES, drawn once a session."""
    drawn: dict[str, chronos.RandomChronos] = {}

    def draw(name: str) -> chronos.RandomChronos:
        if name not in drawn:
            folder = chronos.write_model(chronos.SHAPES[name], tmp_path_factory.mktemp("models") / name)
            drawn[name] = chronos.RandomChronos(name, folder)
        return drawn[name]

    return draw


def pytest_terminal_summary(terminalreporter):
    if parity.worst:
        terminalreporter.write_line("largest differences from the reference:")
        for stage, error in parity.worst.items():
            terminalreporter.write_line(f"  {stage:12} {error:.1e}")

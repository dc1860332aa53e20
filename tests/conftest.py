"""Hypothesis draws the same examples in every run, without a time limit for one; plots touch nothing global."""

import gc
from io import BytesIO

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("fixed")

gc.disable()  # until all is imported, which makes no garbage to speak of


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def nothing_global(monkeypatch):
    mpl.use("Agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda *_, **__: shown.append("pyplot"))
    monkeypatch.setattr(mpl.figure.Figure, "show", lambda *_, **__: shown.append("figure"))
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    assert not shown
    plt.close("all")


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports hold one pixel in place of each figure: writing these takes longer than all that many tests ask about."""
    from repgraph import report

    pixel = BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")

    def save(ax, path):
        path.write_bytes(pixel.getvalue())
        plt.close(ax.get_figure(root=True))

    monkeypatch.setattr(report, "_save", save)


@pytest.fixture
def one_thread():
    """On inputs as small as those of most tests several threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

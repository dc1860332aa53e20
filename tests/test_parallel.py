"""Layers and blocks of pairs in other processes: the same numbers, errors and warnings as here."""

import pickle

import joblib
import pandas as pd
import pytest
import torch

import repgraph
from repgraph.metrics.similarity import gbs, linear_cka
from repgraph.parallel import Item, each

OPTIONS = {"n": 30, "repeats": 2, "metrics": ("modularity", "gbs", "cka", "complexity"), "progress": False}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(10)]
    return torch.nn.Sequential(*blocks)


@pytest.fixture(scope="module")
def data():
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 3


@pytest.fixture(scope="module", params=["loky", "dask"])
def workers(request):
    """What a user writes to have two workers."""
    if request.param == "loky":
        yield lambda: joblib.parallel_config("loky", n_jobs=2)
        return
    distributed = pytest.importorskip("dask.distributed")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        assert len(client.scheduler_info()["workers"]) == 2
        yield lambda: joblib.parallel_config("dask")


@pytest.mark.parametrize("place", ["memory", "files"])
def test_profile_is_the_same_on_two_workers(workers, model, data, place, tmp_path):
    names = [f"{i}.1" for i in range(10)]
    acts = repgraph.capture(model, data, [*names, "gates"], folder=tmp_path / "acts" if place == "files" else None)
    expected = repgraph.profile_activations(acts, **OPTIONS)
    with workers():
        table = repgraph.profile_activations(acts, folder=tmp_path / "rows", **OPTIONS)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)
    pd.testing.assert_series_equal(table["modularity"], expected["modularity"], check_exact=True)
    assert table.attrs == expected.attrs
    assert len(list((tmp_path / "rows").glob("*.row.json"))) == 10
    again = repgraph.profile_activations(acts, folder=tmp_path / "rows", **OPTIONS)  # here, from the rows kept there
    pd.testing.assert_frame_equal(again, table, check_exact=True)


def test_a_budget_that_needs_several_passes_is_the_same_on_two_workers(workers, model, data):
    expected = repgraph.profile(model, data, layers="leaves", **OPTIONS)
    with workers():
        table = repgraph.profile(model, data, layers="leaves", memory=60 * 8 * 4 * 4, **OPTIONS)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)


def test_tables_of_pairs_are_the_same_on_two_workers(workers, model, data):
    acts = repgraph.capture(model, data, [f"{i}.0" for i in range(10)])
    measures = {"gbs": gbs, "cka": linear_cka}
    expected = repgraph.compare_layers(measures, acts, progress=False)
    with workers():
        tables = repgraph.compare_layers(measures, acts, progress=False)
    for name in measures:
        pd.testing.assert_frame_equal(tables[name], expected[name], rtol=1e-6)
        assert tables[name].attrs == pytest.approx(expected[name].attrs)


def test_functions_of_the_user_travel(workers, data):
    acts = repgraph.Activations({f"layer {i}": torch.full_like(data[0], i) for i in range(12)})
    scale = 2.0
    with workers():
        found = repgraph.apply_layers(lambda x: scale * x.mean(), acts)
    assert found.to_dict() == {f"layer {i}": 2.0 * i for i in range(12)}


def test_errors_and_warnings_come_back_with_the_layer(workers, data):
    x = data[0]
    with workers():
        with pytest.warns(UserWarning, match=r"layer 'flat': constant features") as told:
            repgraph.between_layers(gbs, {"good": x, "flat": torch.ones_like(x)}, progress=False)
        assert {warning.filename for warning in told} == {__file__}
        with pytest.raises(ValueError, match=r"layer 'bad'.*finite"):
            repgraph.between_layers(linear_cka, {"good": x, "bad": x.log()}, progress=False)


def test_threads_share_passes_over_the_data_one_at_a_time(model, data):
    options = OPTIONS | {"layers": [f"{i}.0" for i in range(10)], "metrics": ("modularity",)}
    expected = repgraph.profile(model, data, **options)
    with joblib.parallel_config("threading", n_jobs=4):
        table = repgraph.profile(model, data, memory=60 * 8 * 4 * 4, **options)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)


def test_what_is_in_files_travels_as_paths(data, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 1000))
    acts = repgraph.capture(model, data, "leaves", folder=tmp_path / "whole")
    parts = [repgraph.capture(model, data, "leaves", shard=(i, 2), folder=tmp_path / str(i)) for i in range(2)]
    for one in (acts, acts.subset(slice(5, 30)), repgraph.join_shards(parts)):
        sent = pickle.dumps(Item(one, "0"))
        assert len(sent) < one["0"].nbytes / 10
        assert torch.equal(pickle.loads(sent).read(), one["0"])
    for path in (tmp_path / "whole").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"layer '0': cannot read"):
        pickle.loads(pickle.dumps(Item(acts, "0"))).read()


def test_here_a_task_is_taken_when_the_one_before_is_done():
    events = []

    def tasks():
        for i in range(3):
            events.append(("taken", i))
            yield (i,)

    def work(i):
        events.append(("done", i))
        return i

    assert list(each(work, tasks(), 3, "work", "task", progress=False)) == [0, 1, 2]
    assert events == [(what, i) for i in range(3) for what in ("taken", "done")]


def test_an_item_reads_when_it_is_used_and_only_itself():
    class Layers(dict):
        read = ()

        def __getitem__(self, name):
            self.read = (*self.read, name)
            return super().__getitem__(name)

    layers = Layers(a=1, b=2)
    item = Item(layers, "b")
    assert layers.read == ()
    assert item.read() == 2
    rebuild, arguments = item.__reduce__()
    assert rebuild(*arguments).read() == 2
    assert arguments == ({"b": 2}, "b")
    assert layers.read == ("b", "b")

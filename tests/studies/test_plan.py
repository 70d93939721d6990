"""What `rsm-probe check` finds out: as much as a run would refuse, and what it would cost; nothing is left behind."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rsm_probe.errors import CostError, ImageError, LayerError, StorageError
from rsm_probe.pairs.tile_plan import TILE_SECONDS, tiling_seconds
from rsm_probe.studies import read_study

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
MODEL = {"name": "net", "source": "timm:test_resnet", "weights": None}
IMAGES = {"source": "digits", "split": "test", "size": 32, "count": 10}


def study(folder: Path, name: str, **keys: object):
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump({"study": name, "models": [MODEL], "images": IMAGES, **keys}))
    return read_study(file)


@pytest.mark.parametrize("file", ["sweep", "pairs", "brain", "figures", "paper"])
def test_every_kind_of_study_is_planned_without_training_or_writing(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    text = str(read_study(SMOKE / f"{file}.yaml").plan(tmp_path / "out"))
    assert "estimate: " in text
    assert "not estimated: training " in text
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.rand(3), expected)


def test_a_plan_holds_models_layers_images_and_pairs(tmp_path):
    plan = study(tmp_path, "sweep", batch_size=6, layers=["layer1", "layer2"], keep=["layer2"]).plan(tmp_path / "out")
    (model,) = plan.models
    assert [layer.name for layer in model.layers] == ["net/layer1", "net/layer2"]
    assert [layer.locations for layer in model.layers] == [40 * 40, 20 * 20]
    assert (dict(model.images), model.pairs, plan.to_train) == ({"digits": 10}, 2 * (5 * 4 // 2), [])
    assert "layers layer1 (S=1600), layer2 (S=400); 10 digits; 20 pairs per layer" in str(plan)
    assert plan.seconds > 0


def test_pairs_of_two_sets_and_their_bytes_on_disk_are_counted(tmp_path):
    database = {**IMAGES, "count": 7}
    plan = study(tmp_path, "pairs", layers="layer2", database=database, matchings=["identity"]).plan(tmp_path / "out")
    (model,) = plan.models
    assert (dict(model.images), model.pairs) == ({"digits": 10, "database": 7}, 70)
    assert plan.disk_bytes == 17 * model.layers[0].token_bytes + 70 * 16
    assert plan.seconds > 5 * 4 * TILE_SECONDS  # tiles of two images on each side


def test_tiles_of_one_set_count_once():
    assert tiling_seconds(10, None, 100, 5) == pytest.approx(3 * TILE_SECONDS)
    assert tiling_seconds(80, None, 100, None) == pytest.approx(36 * TILE_SECONDS)
    assert tiling_seconds(80, None, 16 << 20, None) == pytest.approx(80 * 81 / 2 * TILE_SECONDS)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"layers": "layer9"}, LayerError),
        ({"images": {"source": "./none"}}, ImageError),
        ({"keep": ["layer9"]}, LayerError),
    ],
)
def test_what_a_run_would_refuse_is_refused(tmp_path, keys, error):
    with pytest.raises(error):
        study(tmp_path, "sweep", **keys).plan(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "keys", "work"),
    [
        ("sweep", {"batch_size": 5}, r"this sweep would take about "),
        ("pairs", {"permutations": True}, r"layer 'layer2' of model 'net': 45 pairs would take about "),
    ],
)
def test_a_plan_says_whether_the_limit_of_hours_would_refuse_it_as_a_run_does(tmp_path, name, keys, work):
    keys = {"layers": "layer2", "matchings": ["optimal"], **keys}
    fitting = study(tmp_path, name, max_hours=5, **keys).plan(tmp_path / "out")
    assert fitting.refusal is None
    assert str(fitting).endswith("within the limit of max_hours: 5")
    limited = study(tmp_path, name, max_hours=1e-9, **keys)
    plan = limited.plan(tmp_path / "out")
    assert re.search(rf"run would refuse this: {work}[^,]*, above max_hours=1e-09; .*raise max_hours", str(plan))
    with pytest.raises(CostError, match=r"above max_hours=1e-09"):
        limited.run(tmp_path / "out")
    assert "max_hours" not in str(study(tmp_path, name, max_hours=None, **keys).plan(tmp_path / "none"))


def test_a_begun_run_of_pairs_is_judged_by_the_pairs_that_are_left(tmp_path):
    out, keys = tmp_path / "out", {"layers": ["layer3", "layer4"], "matchings": ["identity", "optimal"], "tile": 5}
    begun = study(tmp_path, "pairs", **keys)
    assert begun.plan(out).models[0].left is None
    begun.run(out)
    limited = study(tmp_path, "pairs", max_hours=1e-9, **keys)
    plan = limited.plan(out)
    assert (plan.refusal, plan.seconds) == (None, 0)
    assert "captured already, 0 pairs of all layers and matchings are left" in str(plan)
    limited.run(out)
    # Layers are numbered in the order of the capture; of 10 images in tiles of 5, one tile holds 25 pairs.
    (out / "pairs" / "net" / "001-optimal.zarr" / "product" / "c" / "0" / "1").unlink()
    (model,) = (plan := limited.plan(out)).models
    assert model.left.pairs == {
        "net/layer3": {"identity": 0, "optimal": 0},
        "net/layer4": {"identity": 0, "optimal": 25},
    }
    assert re.search("run would refuse this: layer 'layer4' of model 'net': 25 pairs would take", str(plan))
    with pytest.raises(CostError, match="25 pairs would take about"):
        limited.run(out)
    shutil.rmtree(out / "pairs" / "net" / "000-identity.zarr")
    (model,) = begun.plan(out).models
    assert model.left.pairs["net/layer3"] == {"identity": 45, "optimal": 0}


def test_pairs_with_a_database_are_judged_by_what_is_left_as_well(tmp_path):
    out, keys = tmp_path / "out", {"layers": "layer4", "matchings": ["optimal"], "database": {**IMAGES, "count": 7}}
    limited = study(tmp_path, "pairs", max_hours=1e-9, **keys)
    study(tmp_path, "pairs", **keys).run(out)
    assert limited.plan(out).refusal is None
    shutil.rmtree(out / "pairs")
    assert limited.plan(out).models[0].left.pairs == {"net/layer4": {"optimal": 70}}
    assert "70 pairs would take" in str(limited.plan(out).refusal)
    shutil.rmtree(out / "captures" / "net-database.zarr")
    assert limited.plan(out).models[0].left is None


def test_a_finished_sweep_is_not_refused_as_a_run_only_reads_it(tmp_path):
    keys = {"layers": "layer2", "matchings": ["optimal"], "batch_size": 5}
    study(tmp_path, "sweep", **keys).run(tmp_path / "out")
    limited = study(tmp_path, "sweep", max_hours=1e-9, **keys)
    assert limited.plan(tmp_path / "out").refusal is None
    limited.run(tmp_path / "out")


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(StorageError, match="not a run folder"):
        study(tmp_path, "sweep").plan(tmp_path / "out")

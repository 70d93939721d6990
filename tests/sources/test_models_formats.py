"""Weights under the names of a library's files, adapters without their network, arrays, lists and pickled modules."""

import copy

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from rsm_probe import load_model
from rsm_probe.errors import ModelError


def _vit(classes: int = 3, kind: str = "ViTForImageClassification"):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=classes,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def _equal(one: nn.Module, other: nn.Module) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def vit():
    return _vit()


@pytest.fixture(scope="module")
def saved(vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    vit.save_pretrained(folder / "whole")
    vit.save_pretrained(folder / "shards", max_shard_size="5KB")
    return folder


@pytest.mark.parametrize("file", ["whole", "whole/model.safetensors", "shards"])
def test_what_transformers_saved_fits_the_same_class(file, vit, saved):
    assert _equal(load_model(_vit(), weights=saved / file).module, vit)


@pytest.mark.filterwarnings("ignore")
def test_missing_weights_draw_no_random_numbers(saved):
    model, before = _vit(7), torch.get_rng_state()
    load_model(model, weights=saved / "whole", strict=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore")
def test_names_of_files_and_another_head(vit, saved):
    with pytest.raises(ModelError, match=r"different shape: classifier\.weight, classifier\.bias\); strict=False"):
        load_model(_vit(7), weights=saved / "shards")
    loaded = load_model(_vit(7), weights=saved / "shards", strict=False)
    assert loaded.incomplete == ("classifier.weight", "classifier.bias")
    assert _equal(loaded.module.vit, vit.vit)
    # Its own source builds the head that the file has.
    _vit(7).save_pretrained(saved / "seven")
    assert load_model(f"hf-classifier:{saved / 'whole'}", weights=saved / "seven").module.classifier.out_features == 7


def test_weights_of_another_model_of_the_library_are_refused(saved):
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=16))
    with pytest.raises(ModelError, match=r"do not fit SwinModel \(missing: .*unknown: "):
        load_model(swin, weights=saved / "whole")


@pytest.fixture(scope="module")
def adapted(vit, saved):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, modules_to_save=["classifier"])
    model = peft.get_peft_model(copy.deepcopy(vit), config).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(saved / "adapter")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["module", "folder"])
@pytest.mark.parametrize("file", ["adapter", "adapter/adapter_model.safetensors"])
def test_an_adapter_is_merged_into_its_network(source, file, vit, saved, adapted):
    own = copy.deepcopy(vit).train()
    loaded = load_model(own if source == "module" else f"hf-classifier:{saved / 'whole'}", weights=saved / file)
    by_hand = copy.deepcopy(adapted).merge_and_unload()
    assert _equal(loaded.module, by_hand)
    assert not _equal(loaded.module, vit)
    assert {part.training for part in loaded.module.modules()} == {source == "module"}
    assert all(parameter.requires_grad for parameter in loaded.module.parameters())


def test_an_adapter_of_another_network_is_refused_before_it_changes_anything(saved, adapted):
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    names = list(other.state_dict())
    with pytest.raises(ModelError, match=r"does not belong to Sequential.*vit\.layers\.0\.attention\.q_proj\.lora_A"):
        load_model(other, weights=saved / "adapter")
    assert list(other.state_dict()) == names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_an_adapter_alone_name_the_line_that_loads_them(strict, vit, saved, adapted):
    peft = pytest.importorskip("peft")
    alone, whole = saved / "alone.pt", saved / "whole.pt"
    torch.save(peft.get_peft_model_state_dict(adapted), alone)
    torch.save(adapted.state_dict(), whole)
    config = adapted.peft_config["default"]
    with pytest.raises(ModelError, match=r"q_proj\.lora_A.*scale.*set_peft_model_state_dict\(adapted, torch\.load"):
        load_model(copy.deepcopy(vit), weights=alone, strict=strict)
    again = peft.get_peft_model(copy.deepcopy(vit), config)
    peft.set_peft_model_state_dict(again, torch.load(alone))
    assert _equal(load_model(again).module, adapted)
    with pytest.raises(ModelError, match=r"load_model\(peft\.get_peft_model\(model, config\), weights='.*whole\.pt'\)"):
        load_model(copy.deepcopy(vit), weights=whole, strict=strict)
    assert _equal(load_model(peft.get_peft_model(copy.deepcopy(vit), config), weights=whole).module, adapted)


def test_an_adapter_of_a_pipeline_names_the_pipeline(tmp_path):
    save_file({"unet.mid.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match=r"pipeline\.load_lora_weights\('.*then pipeline\.fuse_lora\(\)"):
        load_model(nn.Linear(2, 2), weights=tmp_path / "pytorch_lora_weights.safetensors")


@pytest.mark.filterwarnings("ignore:weights of")
@pytest.mark.parametrize(
    "holding",
    [
        lambda state: {name: value.numpy() for name, value in state.items()},
        lambda state: {"state_dict": {k: v.numpy() for k, v in state.items()}, "accuracy": np.float64(0.5)},
        lambda state: [state, {"optimizer": {}}, 3],
        lambda state: (state, 0.5),
        lambda state: {"models": [state]},
    ],
)
def test_arrays_and_lists_hold_weights_too(holding, tmp_path):
    one, other = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    )
    torch.save(holding(one.state_dict()), tmp_path / "w.pt")
    assert _equal(load_model(other, weights=tmp_path / "w.pt").module, one)


def test_several_models_in_a_list_are_chosen_by_position(tmp_path):
    states = [nn.Linear(2, 3).state_dict(), nn.Linear(2, 3).state_dict()]
    torch.save(states, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="choose with key='0' or key='1'"):
        load_model(nn.Linear(2, 3), weights=tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="key='1'"):
        loaded = load_model(nn.Linear(2, 3), weights=tmp_path / "w.pt", key="1")
    assert torch.equal(loaded.module.weight, states[1]["weight"])


def test_values_without_names_are_given_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 3)
    torch.save(list(model.state_dict().values()), "values.pt")
    with pytest.raises(ModelError, match=r"torch\.save\(dict\(zip\(model\.state_dict\(\), torch\.load\('values\.pt'"):
        load_model(nn.Linear(2, 3), weights="values.pt")
    torch.save(dict(zip(nn.Linear(2, 3).state_dict(), torch.load("values.pt"), strict=True)), "weights.pt")
    assert _equal(load_model(nn.Linear(2, 3), weights="weights.pt").module, model)


def test_arrays_of_objects_are_not_built(tmp_path):
    torch.save({"weight": np.array([print], dtype=object)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="could run any code"):
        load_model(nn.Linear(2, 3), weights=tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_module_is_a_model_only_where_that_is_allowed(tmp_path):
    model, file = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), tmp_path / "model.pt"
    torch.save(model, file)
    with pytest.raises(ModelError, match=r"load_model\(SOURCE, weights='.*model\.pt'\).*allow_pickle=True"):
        load_model(file)
    loaded = load_model(file, allow_pickle=True)
    assert loaded.name == "model"
    assert not loaded.module.training
    assert _equal(loaded.module, model)
    torch.save(model.state_dict(), file)
    with pytest.raises(ModelError, match="holds a OrderedDict rather than a module; give it as weights"):
        load_model(file, allow_pickle=True)
    with pytest.raises(ModelError, match=r"no model at .*missing\.pt"):
        load_model(tmp_path / "missing.pt")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_read_for_its_weights(tmp_path):
    model, file = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), tmp_path / "scripted.pt"
    torch.jit.trace(model, torch.ones(1, 3, 8, 8)).save(file)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ModelError, match=r"TorchScript archive.*allow_pickle=True"):
        load_model(other, weights=file)
    assert _equal(load_model(other, weights=file, allow_pickle=True).module, model)
    with pytest.raises(ModelError, match=r"scripted or traced module, whose layers cannot be probed.*weights='"):
        load_model(file, allow_pickle=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["LoKrConfig", "VeraConfig", "IA3Config"])
def test_other_kinds_of_adapters_are_merged_too(kind, vit, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"]} | ({"feedforward_modules": []} if kind == "IA3Config" else {})
    model = peft.get_peft_model(copy.deepcopy(vit), getattr(peft, kind)(**options)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.linspace(0.1, 0.2, value.numel()).view(value.shape))
    model.save_pretrained(tmp_path)
    merged = load_model(copy.deepcopy(vit), weights=tmp_path).module
    assert not _equal(merged, vit)
    assert _equal(merged, model.merge_and_unload())


def test_folders_list_the_files_that_may_be_meant(tmp_path):
    (tmp_path / "unet").mkdir()
    model, file = nn.Linear(2, 3), tmp_path / "unet" / "model.fp16.safetensors"
    save_file(model.state_dict(), file)
    for folder, named in ((tmp_path, r"unet.model\.fp16\.safetensors"), (tmp_path / "unet", r"it has model\.fp16\.")):
        with pytest.raises(ModelError, match=f"name the file with the weights; .*{named}"):
            load_model(nn.Linear(2, 3), weights=folder)
    assert _equal(load_model(nn.Linear(2, 3), weights=file).module, model)


def test_arrays_in_files_of_numpy_say_how_to_store_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 3)
    np.savez("w.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    with pytest.raises(
        ModelError, match=r"store what numpy\.load reads by torch\.save\(dict\(\.\.\.\), 'weights\.pt'\)"
    ):
        load_model(nn.Linear(2, 3), weights="w.npz")
    torch.save(dict(np.load("w.npz")), "weights.pt")
    assert _equal(load_model(nn.Linear(2, 3), weights="weights.pt").module, model)

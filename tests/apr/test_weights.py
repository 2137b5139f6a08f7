"""Initial weights: random said aloud, checkpoint files, and what goes wrong with them."""

from __future__ import annotations

import logging
import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from posemap_fast.apr.backbones import VGG16, Compact, weights
from posemap_fast.errors import BackendError, ConfigError, FileFormatError


class Small(nn.Module):
    """Stands in for a backbone, so that files are small."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in Small().state_dict().items()}


def _load(source: str) -> Small:
    net = Small()
    weights.initialise(net, "small", source, ignore=("classifier.",), imagenet_url="https://example.invalid/small.pth")
    return net


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_loads_and_its_classifier_is_ignored(tmp_path, suffix):
    path = tmp_path / f"small{suffix}"
    state = {**_state(), "classifier.0.weight": torch.zeros(3, 3)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for key, value in _load(str(path)).state_dict().items():
        assert torch.equal(value, state[key])


def test_a_torchvision_shaped_vgg16_file_loads(tmp_path):
    state = {key: torch.full_like(value, 0.01) for key, value in VGG16(None).state_dict().items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg16.pth")
    net = VGG16(str(tmp_path / "vgg16.pth"))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def _without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in _state().items() if name != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (_without("features.2.bias"), r"missing features\.2\.bias"),
        ({**_state(), "fc.weight": torch.zeros(1)}, r"unexpected fc\.weight"),
        (
            {**_state(), "features.0.weight": torch.zeros(4, 3, 5, 5)},
            r"features\.0\.weight is \(4, 3, 5, 5\), expected \(4, 3, 3, 3\)",
        ),
        ({"model." + key: value for key, value in _state().items()}, "and 5 more"),
    ],
    ids=["missing", "unexpected", "misshapen", "prefixed"],
)
def test_a_file_that_does_not_fit_is_refused_with_the_keys(tmp_path, state, message):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(FileFormatError, match=message):
        _load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("name", ["damaged.pth", "damaged.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match="not a readable checkpoint"):
        _load(str(tmp_path / name))


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(_state(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FileFormatError, match=r"cut\.pth"):
        _load(str(path))


def test_a_file_with_code_or_other_objects_is_refused(tmp_path):
    torch.save(Small(), tmp_path / "module.pth")
    with pytest.raises(FileFormatError, match="not a readable checkpoint"):
        _load(str(tmp_path / "module.pth"))
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(FileFormatError, match="dictionary of tensors"):
        _load(str(tmp_path / "epoch.pth"))


def test_a_missing_file_names_the_path_and_the_choices(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.pth.*'random'"):
        _load(str(tmp_path / "nowhere.pth"))


def test_random_weights_are_said_aloud_and_none_is_silent(caplog):
    with caplog.at_level(logging.INFO):
        _load("random")
    assert "random weights" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
    caplog.clear()
    weights.initialise(Small(), "small", None)
    assert caplog.text == ""


def test_a_failed_download_names_the_file_and_the_mend(monkeypatch):
    def refuse(url: str, **options: object) -> None:
        assert options["weights_only"] is True and options["check_hash"] is True
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(BackendError, match=r"vgg16-397923af\.pth.*no network.*set `weights` to its path"):
        VGG16("imagenet")


def test_imagenet_loads_what_the_download_returns(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: _state(7))
    assert torch.equal(_load("imagenet").features[0].weight, _state(7)["features.0.weight"])


def test_a_backbone_without_imagenet_weights_says_so():
    with pytest.raises(ConfigError, match="compact has no ImageNet checkpoint"):
        Compact("imagenet")

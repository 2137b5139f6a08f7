"""Where a backbone's first weights come from: random, a checkpoint file, or torchvision's ImageNet download."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from posemap_fast.errors import BackendError, ConfigError, FileFormatError

__all__ = ["IMAGENET", "RANDOM", "initialise"]

RANDOM = "random"
IMAGENET = "imagenet"
_log = logging.getLogger(__name__)


def initialise(
    module: nn.Module, name: str, source: str | None, ignore: Sequence[str] = (), imagenet_url: str | None = None
) -> None:
    """Load the weights that `source` names into `module`; 'random' keeps those it was built with.

    Args:
        name: the backbone's name, for messages.
        source: 'random', 'imagenet', the path of a `.pth`/`.pt`/`.safetensors` file, or None when the caller
            loads a whole state dict next.
        ignore: key prefixes that the file may have and the module does not want (a classifier).
        imagenet_url: torchvision's checkpoint, None when there is none.
    Raises:
        ConfigError: no such file, or no ImageNet weights for this backbone.
        BackendError: the download failed.
        FileFormatError: damaged file; missing, extra or misshapen tensors.
    """
    if source is None:
        return
    if source == RANDOM:
        level = logging.INFO if imagenet_url is None else logging.WARNING  # a warning where better is to be had
        _log.log(level, "%s: starts from random weights; `weights: <checkpoint>` starts from trained ones", name)
        return
    state = _download(name, imagenet_url) if source == IMAGENET else read_checkpoint(source)
    wanted = {key: value for key, value in state.items() if not key.startswith(tuple(ignore))}
    _load_exactly(module, name, source, wanted)
    _log.info("%s: loaded %d tensors from %s", name, len(wanted), source)


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """State dict of a `.safetensors` file, or of a torch file read with `weights_only=True` (no code runs)."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"weights: no file {path}; give an existing .pth or .safetensors file, or 'random'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(f"{path}: not a readable checkpoint ({cause}); copy it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FileFormatError(f"{path}: expected a dictionary of tensors as torchvision saves; got another object")
    return dict(state)


def _download(name: str, url: str | None) -> dict[str, torch.Tensor]:
    if url is None:
        raise ConfigError(f"weights: {name} has no ImageNet checkpoint; use 'random' or a file trained with it")
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network, wrong hash, unwritable cache
        raise BackendError(
            f"weights: could not download {url} ({error}); fetch that file on another machine and set "
            f"`weights` to its path, or set `weights: {RANDOM}`"
        ) from error


def _load_exactly(module: nn.Module, name: str, source: str, state: dict[str, torch.Tensor]) -> None:
    own = module.state_dict()
    for key in own:  # a counter that published files may lack and nothing here uses
        if key.endswith("num_batches_tracked") and key not in state:
            state[key] = torch.zeros_like(own[key])
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        listing = "; ".join(problems[:3]) + more
        raise FileFormatError(f"weights: {source} does not fit {name}: {listing}; give a checkpoint of {name}")
    module.load_state_dict(state)

"""Strict configuration: YAML files and `--set a.b=c` into frozen dataclasses that live beside what they configure."""

from __future__ import annotations

from posemap_fast.config.load import diff, dump_yaml, from_dict, load_config, to_dict

__all__ = ["diff", "dump_yaml", "from_dict", "load_config", "to_dict"]

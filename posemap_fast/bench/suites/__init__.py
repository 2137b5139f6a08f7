"""The benchmark families, one file per suite; importing this registers them."""

from posemap_fast.bench.case import FAMILIES
from posemap_fast.bench.suites import infer, ops, pipeline, refine, render, train

__all__ = ["FAMILIES", "infer", "ops", "pipeline", "refine", "render", "train"]

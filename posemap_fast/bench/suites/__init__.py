"""The benchmark families, one file per suite; importing this registers them."""

from posemap_fast.bench.suites import ops

__all__ = ["ops"]

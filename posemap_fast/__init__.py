"""posemap_fast: camera localization by absolute pose regression supervised with neural volumetric pose features."""

__version__ = "0.1.0"

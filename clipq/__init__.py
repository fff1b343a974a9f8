"""clipq: an end-to-end CLIP training framework with low-precision linear layers and stable optimizers."""

__version__ = "0.1.0"

"""peftscale: soft prompts through a frozen, quantised, sharded language model."""

__version__ = "0.1.0"

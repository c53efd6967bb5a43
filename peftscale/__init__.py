"""peftscale: soft prompts through a frozen, quantised, sharded language model.

The names in `__all__` are the Python interface; README.md shows it. They are imported when they are first used, so that
`import peftscale` stays without torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftscale.config import AdapterTrainConfig, PrefixConfig, SoftPromptConfig
    from peftscale.session import Base, Batch, Session, StepResult, load_base, ranks

__version__ = "0.1.0"

__all__ = [
    "AdapterTrainConfig",
    "Base",
    "Batch",
    "PrefixConfig",
    "Session",
    "SoftPromptConfig",
    "StepResult",
    "load_base",
    "ranks",
]

if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "config" if name.endswith("Config") else "session"
        return getattr(import_module(f"{__name__}.{module}"), name)

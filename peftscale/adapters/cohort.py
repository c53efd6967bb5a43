"""Cohort: the adapters that one run trains over one base, by name and in a fixed order.

One adapter is a cohort of one. How a batch is shared between them is `data.batches`; their optimizer is
`train.optim`.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from peftscale.adapters.prefix import Prefix
from peftscale.adapters.reparam import ReparametrisedPrefix, ResidualPrompt
from peftscale.adapters.soft_prompt import SoftPrompt
from peftscale.errors import AdapterError

Adapter = SoftPrompt | Prefix | ResidualPrompt | ReparametrisedPrefix
"""What is trained."""
Folded = SoftPrompt | Prefix
"""What passes see, files keep and evaluations use: `Adapter.folded()`."""


class Cohort(Mapping[str, Adapter]):
    """name -> adapter, in the order of the run file.

    The order is part of the contract: every rank flattens the gradients in it before the one all-reduce, and a
    checkpoint stores the tensors in it.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        """Take the adapters as they are, in the order of the mapping.

        Raises:
            AdapterError: there is none, or they belong to bases of different hidden sizes or key heads.
        """
        sizes = {name: a.hidden_size for name, a in adapters.items() if isinstance(a, SoftPrompt | ResidualPrompt)}
        shapes = {name: a.shape for name, a in adapters.items() if isinstance(a, Prefix | ReparametrisedPrefix)}
        if len(set(sizes.values())) > 1 or not adapters:
            given = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "no adapter"
            raise AdapterError(f"adapters: need at least one, all of one hidden size; got {given}")
        if len(set(shapes.values())) > 1:
            given = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
            raise AdapterError(f"adapters: prefixes must be of one shape (layers, key heads, head size); got {given}")
        self._adapters = dict(adapters)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor as 'adapter/tensor', in the order of the cohort. Names of adapters hold no slash."""
        return {
            f"{name}/{tensor}": parameter
            for name, adapter in self.items()
            for tensor, parameter in adapter.named_parameters()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Every trained tensor, in the order of the cohort."""
        return list(self.named_parameters().values())

    @property
    def num_parameters(self) -> int:
        """Trained numbers of all adapters together."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_bytes(self) -> int:
        """Bytes of all trained tensors: what one gradient all-reduce carries."""
        return sum(parameter.nbytes for parameter in self.parameters())

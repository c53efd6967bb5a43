"""LoRA through PEFT: low-rank updates of linear weights, replicated, their gradients summed by `train.comm`.

PEFT owns the layers and the format of what is saved; optimizer and checkpoint are those of adapters. Over nf4 this is
QLoRA. The steps are `baselines.training`.

Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from types import ModuleType

import torch
from torch import Tensor

from peftscale.adapters import directory
from peftscale.base.load import Base
from peftscale.baselines import model
from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.train import comm, optim
from peftscale.train.journal import Journal
from peftscale.train.optim import AdapterOptimizer


class Lora:
    """The updates inside a base, which is changed in place and otherwise frozen. A `training.Learner`."""

    def __init__(self, base: Base, cfg: RunConfig, journal: Journal) -> None:
        """Put updates that change nothing yet into the base, the same ones on every rank by seed.

        Raises:
            ConfigError: PEFT is not installed, or finds no such linears.
        """
        assert cfg.lora is not None  # checked with the run file
        peft, section = library(), cfg.lora
        modules = section.target_modules
        settings = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=0.0,
            target_modules="all-linear" if modules == ("all-linear",) else modules and list(modules),
        )
        try:
            devices = [base.device] if base.device.type == "cuda" else []
            with model.quiet(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(cfg.seed)
                self._model = peft.get_peft_model(base.model, settings)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules={modules}: {error}") from error
        self._model.peft_config["default"].base_model_name_or_path = cfg.base.model
        self.base = base
        self.through = base.model
        self.named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = AdapterOptimizer(self.named.values(), cfg.baseline_train)
        self._best = self._values()
        self._journal, self._dir = journal, cfg.run_dir / "lora"
        self.directory = self._dir / "best"

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add to the gradient of this rank."""
        loss.backward()

    def update(self, step: int, *, is_finite: bool) -> float | None:
        """Sum the gradients of all ranks and move; nothing moves where a value would not be finite."""
        parameters = list(self.named.values())
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no row
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in parameters if p.grad is not None]
        comm.reduce_(grads)
        if not (is_finite and all(optim.are_finite([grads], squared=True))):
            self._optimizer.clear()
            return None
        stood = self._optimizer.snapshot()
        rate = self._optimizer.update(step)
        if all(optim.are_finite([parameters], squared=True)):
            return rate
        self._optimizer.go_back(stood)  # the gradient was finite and the step too large
        return None

    def keep(self) -> None:
        """Take the present values for the best."""
        self._best = self._values()

    def restore(self) -> None:
        """Put the best values back."""
        self._put(self._best)

    def save(self) -> None:
        """Write PEFT directories of the best values and of the present ones. Rank 0 alone calls it."""
        for which, values in (("best", self._best), ("last", self._values())):
            with directory.filled(self._dir / which) as folder:
                self._model.save_pretrained(folder, state_dict=values, save_embedding_layers=False)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors and moments that a resume needs."""
        values = {"last": self._values(), "best": self._best}
        return {f"{which}/{k}": v for which, named in values.items() for k, v in named.items()}, self._optimizer.state()

    def take_over_(self, tensors: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        device = self.base.device
        self._put({name: tensors[f"last/{name}"] for name in self.named})
        self._best = {name: tensors[f"best/{name}"].to(device) for name in self.named}
        self._optimizer.restore({name: value.to(device) for name, value in moments.items()})

    def close(self) -> None:
        """Nothing is held."""

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(values[name])


def targets(cfg: RunConfig, model_type: str) -> tuple[str, ...]:
    """Last names of the linears that LoRA takes in a base of this family.

    Raises:
        ConfigError: none are named and PEFT knows none for the family, or is not installed.
    """
    assert cfg.lora is not None  # checked with the run file
    if cfg.lora.target_modules:
        return cfg.lora.target_modules
    library()
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if model_type not in known:
        raise ConfigError(f"lora.target_modules: PEFT knows none for {model_type!r}. Name them, or [all-linear].")
    return tuple(known[model_type])


def library() -> ModuleType:
    """PEFT.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"method='lora' needs PEFT, which is not installed ({error}). Install the extra: "
            f"pip install 'peftscale[baselines]'."
        ) from error
    module: ModuleType = peft
    return module

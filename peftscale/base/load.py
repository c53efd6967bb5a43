"""The frozen base, loaded: skeleton on meta, packed once, this rank's slice read, everything frozen.

No rank ever holds the model: a parameter is made, cut to the rank's slice and filled from the packed file
before the next one is made. Training it through prompts is `base.padded`; ZeRO-3 itself is `base.shard`.

Shapes:  N ids   H hidden size
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from peftscale.base import host_memory, pack
from peftscale.base.pack import PackedBase
from peftscale.base.skeleton import Skeleton, build, read_config
from peftscale.config import BaseConfig
from peftscale.errors import ModelError
from peftscale.facts.skeleton import max_positions, own_files

if TYPE_CHECKING:
    from peftscale.base.shard import _Partition

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*")


@dataclass
class Base:
    """A frozen language model on this rank."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    cfg: BaseConfig
    """What was asked for."""
    device: torch.device
    compute_dtype: torch.dtype
    is_sharded: bool
    own_attention: str | None
    """The attention implementation that transformers chose for the model."""
    is_packed: bool = False
    """Passes are packed; set by `exactness.make_packed`."""
    why_padded: str = "packing is off"
    """Where they are not; what was found is set by `train.setup`."""
    why_no_prefix: str | None = None
    """Why the base takes no prefix, empty where it does; None until `adapters.refuse_prefix_on` has tried."""
    notes: tuple[str, ...] = ()
    """What whoever trains through it should know, a line each."""

    @property
    def name(self) -> str:
        """The model as the user named it."""
        return self.cfg.model

    @property
    def hidden_size(self) -> int:
        """H, the width of an input embedding."""
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def is_encoder_decoder(self) -> bool:
        """Text goes to an encoder and targets come from a decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for, prompt included; None where there is no limit. That of
        `BaseFacts`."""
        return max_positions(self.model.config.get_text_config())

    def room(self, length: int) -> int | None:
        """Positions for a text and what stands behind it, that an adapter of so many virtual tokens leaves; None where
        there is no limit."""
        return None if self.max_positions is None else self.max_positions - length

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Input embeddings of ids, as the model makes them (Gemma scales them).

        Collective when the base is sharded: every rank calls it with the same `ids`.

        Args:
            ids: (N,) token ids.

        Returns:
            (N, H) float32 copy on the base's device.
        """
        with torch.no_grad():
            rows_NH: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return rows_NH.float()

    def train(self) -> None:
        """Training passes: activation checkpointing as configured (transformers looks at the training flag)."""
        self.model.train()

    def eval(self) -> None:
        """Evaluation and generation: no checkpointing, caches allowed."""
        self.model.eval()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Passes without gradients, as `eval` says; after them, also when they are interrupted, `train` holds again."""
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train()


def resolve(model: str, revision: str, *, with_weights: bool) -> Path:
    """The directory of a model: itself, or the snapshot of a hub id (downloaded if it is not in the cache).

    Raises:
        ModelError: neither a directory nor a hub id that can be had.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "tokenizer*", "*.model", "*.txt"] + (["*.safetensors"] if with_weights else [])
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"base.model={model} (revision {revision}) is neither a directory nor a model of the hub that can be "
            f"reached ({type(error).__name__}). Give a directory with config.json, tokenizer and safetensors."
        ) from error


@dataclass
class Opened:
    """All of a base that can be had without another rank: its skeleton, its pack and its tokenizer."""

    skeleton: Skeleton
    packed: PackedBase
    tokenizer: PreTrainedTokenizerBase


def open_(cfg: BaseConfig) -> Opened:
    """Find the model, pack it if it is not in the cache, and check that the pack is its own.

    Raises:
        ModelError: the model cannot be read, trained or packed; the message names the key and the tensor.
    """
    host_memory.return_freed()
    model_dir = resolve(cfg.model, cfg.revision, with_weights=cfg.pack_dir is None)
    skeleton = make_skeleton(cfg, model_dir)
    tokenizer = load_tokenizer(model_dir)  # before hours of packing
    directory = cfg.pack_dir or pack.ensure(
        model_dir, skeleton, quantization=cfg.quantization, compute_dtype=getattr(torch, cfg.compute_dtype)
    )
    packed = PackedBase(directory)
    packed.check(skeleton, cfg.quantization, pack.config_sha256(model_dir))
    return Opened(skeleton, packed, tokenizer)


def sharder(device: torch.device) -> ModuleType:
    """`base.shard`, imported late: DeepSpeed takes seconds, and settles at import which device it is for."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from peftscale.base import shard

    return shard


def load(
    cfg: BaseConfig,
    *,
    sharding: Literal["replicated", "node", "world"],
    device: torch.device,
    node: ProcessGroup | None = None,
    prefetch_elements: int = 0,
    opened: "Opened | None" = None,
) -> Base:
    """Load and freeze a base. Sharded, every rank calls it, after `torch.distributed` is up.

    Args:
        cfg: the run file's section.
        sharding: what the plan decided.
        device: of this rank.
        node: the ranks of this rank's node, which hold the base together when sharding is 'node'.
        prefetch_elements: of the plan; storage elements that may be gathered ahead of use.
        opened: what `open_` gave, where the caller wants its errors first.

    Raises:
        ModelError: the model cannot be read, packed or sharded; the message names the key and the tensor.
    """
    assert (sharding == "node") == (node is not None)
    opened = opened or open_(cfg)
    skeleton = opened.skeleton
    is_sharded = sharding != "replicated"
    init = sharder(device).partitioner(node) if is_sharded else None
    _materialise(skeleton, opened.packed, init, device=device)
    notes = prepare(skeleton.model, device=device)
    if is_sharded:
        sharder(device).attach(skeleton.model, skeleton.blocks, prefetch_elements=prefetch_elements)
    if cfg.checkpoint_activations:
        skeleton.model.activation_checkpointing_enable({"use_reentrant": False})
        for module in skeleton.model.modules():
            # T5's cross attention has a bias of zeros, and would ask for its gradient, for which torch takes a kernel
            # that keeps every score.
            if hasattr(module, "has_relative_attention_bias"):
                module.gradient_checkpointing = False
    skeleton.model.train()  # transformers checkpoints in train mode only
    return Base(
        model=skeleton.model,
        tokenizer=opened.tokenizer,
        digest=opened.packed.digest,
        cfg=cfg,
        device=device,
        compute_dtype=getattr(torch, cfg.compute_dtype),
        is_sharded=is_sharded,
        own_attention=skeleton.model.config._attn_implementation,
        notes=notes,
    )


def make_skeleton(cfg: BaseConfig, model_dir: Path) -> Skeleton:
    """The base without its weights, made in a second: whoever calls it first learns whether it can be trained at all.

    Raises:
        ModelError: the architecture is not supported, with the reason.
    """
    compute_dtype: torch.dtype = getattr(torch, cfg.compute_dtype)
    return build(read_config(model_dir), quantization=cfg.quantization, compute_dtype=compute_dtype, where=cfg.model)


def pack_ahead(cfg: BaseConfig, out: Path | None) -> dict[str, str | int]:
    """Pack a base into `out`, or into the cache, and say what came of it.

    Raises:
        ModelError: as `load`, or `out` exists.
    """
    host_memory.return_freed()
    model_dir = resolve(cfg.model, cfg.revision, with_weights=True)
    compute_dtype: torch.dtype = getattr(torch, cfg.compute_dtype)
    skeleton = make_skeleton(cfg, model_dir)
    if out is None:
        directory = pack.ensure(model_dir, skeleton, quantization=cfg.quantization, compute_dtype=compute_dtype)
    elif out.exists():
        raise ModelError(f"--out {out} exists. Choose another directory, or remove it.")
    else:
        directory = out.absolute()
        source, config_sha256 = pack.SafetensorsSource(model_dir), pack.config_sha256(model_dir)
        with pack.writable(directory):
            pack.write(skeleton, source, directory, quantization=cfg.quantization, config_sha256=config_sha256)
    packed = PackedBase(directory)
    return {
        "directory": str(directory),
        "digest": packed.digest,
        "quantization": cfg.quantization,
        "bytes": (directory / pack.WEIGHTS).stat().st_size,
    }


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        ModelError: there is none that transformers can read.
    """
    if not any(place for name in _VOCABULARIES for place in model_dir.glob(name)):  # some families would start empty
        raise ModelError(
            f"base.model={model_dir} has no vocabulary (looked for {', '.join(_VOCABULARIES)}). "
            f"Put tokenizer.json and tokenizer_config.json beside config.json."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        return tokenizer
    except (OSError, ValueError, KeyError, TypeError) as error:
        if code := get_tokenizer_config(model_dir).get("auto_map"):
            raise ModelError(
                f"base.model={model_dir}: its tokenizer is code that came with it ({own_files(code)}), which is never "
                f"run, and no file can allow it. Put a tokenizer.json of the same words there, and a "
                f"tokenizer_config.json without auto_map."
            ) from error
        raise ModelError(
            f"base.model={model_dir} has no tokenizer that transformers can read ({type(error).__name__}). "
            f"Put tokenizer.json and tokenizer_config.json beside config.json."
        ) from error


def _materialise(skeleton: Skeleton, packed: PackedBase, init: "_Partition | None", *, device: torch.device) -> None:
    """Give every meta parameter storage, one at a time, filled with this rank's bytes."""
    made: dict[int, nn.Parameter] = {}  # a tied weight is one parameter under two names
    entries = {entry.name for entry in skeleton.entries}
    for name, meta in list(skeleton.model.named_parameters(remove_duplicate=False)):
        module_name, _, leaf = name.rpartition(".")
        if id(meta) not in made:
            assert name in entries, name
            made[id(meta)] = _filled(packed, name, meta, init, device=device)
        setattr(skeleton.model.get_submodule(module_name), leaf, made[id(meta)])


def _filled(
    packed: PackedBase, name: str, meta: nn.Parameter, init: "_Partition | None", *, device: torch.device
) -> nn.Parameter:
    # torch.empty on CPU takes no memory until it is written, and the slice is cut before anything is.
    parameter = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device=device), requires_grad=False)
    piece, place = parameter.data, 0
    if init is not None:
        piece, place = sharder(device).partition(init, parameter), init.rank
    host = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu", pin_memory=True)
    packed.read_into(name, place * piece.nbytes, pack.raw_bytes(host))
    if host is not piece:
        piece.copy_(host)
    return parameter


def prepare(model: PreTrainedModel, *, device: torch.device) -> tuple[str, ...]:
    """Buffers to the device (DeepSpeed leaves those of a model that is sharded already), dropout out, no cache.

    Returns:
        What whoever trains through the model should know.
    """
    for name, buffer in list(model.named_buffers()):
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, buffer.to(device))
    num_places = _remove_dropout(model)
    model.config.use_cache = False
    model.generation_config = GenerationConfig()  # bart's own would force its last token, others a least length
    return (f"dropout is left out in {num_places} places of the base",) if num_places else ()


def _remove_dropout(model: PreTrainedModel) -> int:
    """In how many places it was. A frozen base is deterministic: transformers checkpoints only in train mode, where
    dropout would act.

    Families keep their rates in `nn.Dropout`, in numbers of a module (starcoder2's residual_dropout) or read them
    from the config in every pass (falcon).
    """
    num_changed = 0
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        if isinstance(holder, nn.Dropout) and holder.p > 0:
            holder.p, num_changed = 0.0, num_changed + 1
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(holder, name, 0.0)
                num_changed += 1
    return num_changed

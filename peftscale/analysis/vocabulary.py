"""Vocabulary: the input embedding of a base, read alone, and what its rows are called.

One tensor is read, of the packed base or, where it was never packed here, of the original weights; the base itself is
not loaded. Rows come out of the model's own embedding module, as a pass would see them.

Shapes:  V vocabulary   H hidden size   N token ids
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftscale.base import load as base_load
from peftscale.base import pack, prefixed
from peftscale.base.pack import PackedBase, SafetensorsSource
from peftscale.base.prefixed import PrefixShape
from peftscale.config import BaseConfig


@dataclass(frozen=True)
class Vocabulary:
    """What `adapters.EmbeddingSource` asks for, and names of tokens."""

    embedding: nn.Embedding
    tokenizer: PreTrainedTokenizerBase
    digest: str | None
    """Of the base; None where it was never packed, so that nobody has hashed it."""
    prefix_shape: PrefixShape
    """Of the base."""

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self.embedding.num_embeddings

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.embedding.embedding_dim

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return torch.device("cpu")

    def embedding_rows(self, ids_N: Tensor, /) -> Tensor:
        """(N, H) float32 copy."""
        with torch.no_grad():
            rows_NH: Tensor = self.embedding(ids_N)
        return rows_NH.float()

    @property
    def table_VH(self) -> Tensor:
        """The rows that have a token, in the dtype of the base. Those behind are padding that was never trained."""
        return self.embedding.weight.detach()[: len(self.tokenizer)]

    def words(self, ids: list[int]) -> list[str]:
        """The text of each token."""
        return [str(self.tokenizer.decode([token])) for token in ids]


def load(cfg: BaseConfig) -> Vocabulary:
    """Read the input embedding of a base, and nothing else of its weights.

    Raises:
        ModelError: the base cannot be read, or a pack belongs to another one.
    """
    compute_dtype: torch.dtype = getattr(torch, cfg.compute_dtype)
    model_dir = base_load.resolve(cfg.model, cfg.revision, with_weights=False)
    skeleton = base_load.make_skeleton(cfg, model_dir)
    tokenizer = base_load.load_tokenizer(model_dir)
    embedding = skeleton.model.get_input_embeddings()
    name = next(name for name, parameter in skeleton.model.named_parameters() if parameter is embedding.weight)
    directory = cfg.pack_dir or pack.cached(model_dir, quantization=cfg.quantization, compute_dtype=compute_dtype)
    digest = None
    if cfg.pack_dir is not None or (directory / pack.MANIFEST).exists():
        packed = PackedBase(directory)
        packed.check(skeleton, cfg.quantization, pack.config_sha256(model_dir))
        digest, weight = packed.digest, torch.empty(embedding.weight.shape, dtype=embedding.weight.dtype)
        packed.read_into(name, 0, pack.raw_bytes(weight))
    else:
        model_dir = base_load.resolve(cfg.model, cfg.revision, with_weights=True)
        weight = pack.read_dense(skeleton, SafetensorsSource(model_dir), name)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    return Vocabulary(embedding, tokenizer, digest, prefixed.shape_of(skeleton.model.config))

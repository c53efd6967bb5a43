"""A random Llama of any size, made one tensor at a time: for benchmarks of bases that nobody wants to download.

A tensor depends on its name and shape alone, so a base is the same on every machine and in every process, and none of
it has to be kept. Packing is `base.pack`, which reads from here as it would from files.

Shapes:  H hidden size   F feed-forward   L blocks
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peftscale.data.batches import Item, training_items
from peftscale.data.tasks import Example
from peftscale.plan import PassSize, Work

TOKENIZER = Path(__file__).parents[2] / "configs" / "quickstart" / "base"
_SHARD_BYTES = 200 * 10**6
_STD = 0.02  # what Llama starts from: activations keep their size through any number of blocks


def llama(*, hidden: int, feed: int, layers: int, heads: int, key_value_heads: int, vocab: int) -> dict[str, Any]:
    """The config.json of a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": feed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


class RandomSource:
    """A `pack.Source` that draws every tensor when it is asked for, in bfloat16."""

    def __init__(self, model_dir: Path) -> None:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)  # a norm
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        draw = torch.Generator().manual_seed(seed)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, _STD, generator=draw)


def save_config(model_dir: Path, config: Mapping[str, Any]) -> None:
    """Write a model directory without weights: config.json and the quickstart's tokenizer."""
    model_dir.mkdir(parents=True)
    (model_dir / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_dir / name).write_bytes((TOKENIZER / name).read_bytes())


def save_weights(model_dir: Path) -> int:
    """Write bfloat16 safetensors and their index beside config.json, a file at a time. Returns their bytes."""
    source = RandomSource(model_dir)
    names: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name, shape in source.shapes().items():
        size = 2 * torch.Size(shape).numel()
        if size > room and names[-1]:
            names.append([])
            room = _SHARD_BYTES
        names[-1].append(name)
        room -= size
    weight_map = {}
    for number, shard in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        save_file({name: source.read(name) for name in shard}, model_dir / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum((model_dir / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_items(adapter: str, prompt_length: int, *, num_rows: int, num_tokens: int, vocab: int) -> list[Item]:
    """Rows of random ids: `num_tokens` - 1 of text and one target each, behind the adapter's prompt."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (num_rows, num_tokens), generator=draw).tolist()
    examples = [Example(i, tuple(row[:-1]), (row[-1],), None, "") for i, row in enumerate(ids)]
    return training_items(adapter, prompt_length, examples)


def one_row(num_tokens: int) -> Work:
    """A step of one row of `num_tokens` with one target, and no evaluation: for the plan."""
    return Work(1, num_tokens, PassSize(num_tokens, rows=1, targets=1, row_tokens=num_tokens - 1), evaluated=())

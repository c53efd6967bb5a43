"""An adapter over its base, as a model of EleutherAI's lm-evaluation-harness, which brings tasks and metrics.

    python -m peftscale.harness --model peftscale --model_args run_file=RUN.yaml,adapter=DIR --tasks hellaswag

That is the harness's own command line: it knows no plugins, so this module puts the model into its list and calls it.
Tokenisation, windows and stop texts are those of its `hf` model; what is computed goes through the passes of training.
Our own tasks are `data.tasks`, their evaluation `train.evaluate`.

Source: lm-evaluation-harness 0.4.13, api/model.py and models/huggingface.py.

Shapes:  M target tokens of all rows   T target tokens of a row   V vocabulary
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from peftscale import configio, redaction
from peftscale.adapters import Adapter, Folded
from peftscale.base.load import Base
from peftscale.base.passes import generate, generates_with, target_logits
from peftscale.data.batches import Item, plan_passes
from peftscale.data.tasks import Example
from peftscale.data.tokens import Ids, TextEncoder
from peftscale.errors import ConfigError, DataError, PeftscaleError
from peftscale.train import comm, use
from peftscale.train.evaluate import BASE_ALONE
from peftscale.train.step import rows_of

log = logging.getLogger(__name__)
T = TypeVar("T")
_NAME = "adapter"
_GREEDY = {"do_sample": False, "temperature": 0.0, "num_beams": 1}
_OF_SAMPLING = {"top_k", "top_p", "min_p"}  # without effect where nothing is sampled


@register_model("peftscale")
class AdapterLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """One adapter over its base, or the base alone.

    Under several ranks each of them is given all requests, shares them with the others and has all results: to the
    harness every rank is the only one.
    """

    def __init__(self, base: Base, adapter: Adapter | Folded | None, *, microbatch_tokens: int = 2048) -> None:
        """Take both as they are: an adapter that is trained on in the meantime is asked as it then is.

        Args:
            base: of `peftscale.load_base`, or of a session.
            adapter: for example `session.cohort["mood"]`; None: the base alone.
            microbatch_tokens: as `train.microbatch_tokens` in a run file.
        """
        super().__init__()
        self.base, self.adapter, self.tokenizer = base, adapter, base.tokenizer
        self.backend = "seq2seq" if base.is_encoder_decoder else "causal"
        self._device = base.device
        self._microbatch_tokens = microbatch_tokens
        self._encoder = TextEncoder(base.tokenizer, is_encoder_decoder=base.is_encoder_decoder)
        self._ranks = ExitStack()  # a process group that was opened for this model lives as long as it does

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "AdapterLM":
        """The model that `--model_args` describes, in this process or as a rank of torchrun.

        Args:
            arg_dict: run_file; adapter, a directory or none; anything else changes the run file.
            additional_config: --batch_size and --device, which always have a value. The run file says both.

        Raises:
            PeftscaleError: an argument, the run file or the adapter cannot be used.
        """
        changes = dict(arg_dict)
        missing = [key for key in ("run_file", "adapter") if key not in changes]
        if missing:
            raise ConfigError(
                f"--model_args: {' and '.join(missing)} must be given, got {dict(arg_dict)}. "
                f"Write run_file=RUN.yaml,adapter=DIR, or adapter=none for the base alone."
            )
        run_file, directory = changes.pop("run_file"), changes.pop("adapter")
        # The harness reads `none` now as a word and now as no value; in a run file it is a word.
        overrides = [f"{key}={'none' if value is None else value}" for key, value in changes.items()]
        cfg = configio.load(run_file, overrides)
        with ExitStack() as ranks:
            device = ranks.enter_context(use.session(cfg))
            opened = use.open_(cfg, [] if directory in (None, "none") else [Path(directory).absolute()], device)
            for note in opened.notes:
                log.warning(note)
            adapter = next(iter(opened.adapters.values()), None)
            model = cls(opened.base, adapter, microbatch_tokens=cfg.train.microbatch_tokens)
            model._ranks = ranks.pop_all()
        return model

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "AdapterLM":
        """As `create_from_arg_obj`, from key=value,key=value."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Most tokens that are read for one prediction: the base's positions less the adapter's, and less the one in
        which our passes read the last target too."""
        positions = int(self.base.max_positions or resolve_max_length(self.base.model.config, self.tokenizer))
        return positions - 1 - (0 if self.adapter is None else self.adapter.length)

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context.

        Raises:
            DataError: the tokenizer has neither a token that begins a text nor one that ends it.
        """
        bos = self.tokenizer.bos_token_id
        token = self.eot_token_id if bos is None else bos
        if token is None:
            raise DataError(
                f"base {self.base.name}: its tokenizer has neither a BOS nor an EOS token to stand in front of a text "
                f"without context. Choose tasks that have one."
            )
        return int(token)

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the chat template by."""
        return self.base.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with what the tokenizer sets in front of it unless the text begins with that itself.

        An EOS behind the text is kept for an encoder-decoder base alone.
        """
        if add_special_tokens is None:
            first = self.tokenizer.bos_token or self.tokenizer.eos_token
            add_special_tokens = first is None or not string.startswith(first)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        return [*self._encoder.start_ids, *ids, *self._encoder.end_ids] if add_special_tokens else ids

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` in which each token is predicted once."""
        windows = [
            [
                (("", text), *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        found = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum((next(found)[0] for _ in of_text), 0.0) for of_text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of their stop texts.

        Raises:
            ConfigError: something else than greedy generation is asked for.
            DataError: as many new tokens as the base has positions.
        """
        items, stops = [], []
        for place, (context, given) in enumerate(request.args for request in requests):
            num_new, stop = self._wanted(given)
            room = self.max_length - (num_new if self.backend == "causal" else 0)
            if room < 1:
                raise DataError(
                    f"generation_kwargs.max_gen_toks={num_new}: {self.max_length} tokens fit beside the adapter, at "
                    f"least one of them for the context. Lower it: --gen_kwargs max_gen_toks=32."
                )
            ids = tuple(self.tok_encode(context) or [self.prefix_token_id])[-room:]
            items.append(self._item(place, ids, (), num_new))
            stops.append(stop)
        adapters = self._folded()
        # Rows of one call end alike and share what stands in front of them.
        groups: dict[tuple[Any, ...], list[Item]] = {}
        for item, stop, row in zip(items, stops, rows_of(items, adapters), strict=True):
            groups.setdefault((item.num_new_tokens, stop, *generates_with(self.base, row)), []).append(item)
        texts: dict[int, str] = {}
        for (num_new, stop, *_), alike in groups.items():
            write = partial(self._written, adapters, num_new=num_new, stop=stop)
            texts |= self._computed(alike, write, is_packed=False)
        return [texts[place] for place in range(len(items))]

    def _written(
        self, adapters: Mapping[str, Folded], of_pass: Sequence[Item], *, num_new: int, stop: Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        written = generate(self.base, rows_of(of_pass, adapters), max_new_tokens=num_new, stop=stop)
        for item, ids in zip(of_pass, written, strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield item.example.index, postprocess_generated_text(text, list(stop), None)

    def _wanted(self, given: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
        """New tokens and stop texts of a request."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
        stop, num_new = tuple(text for text in wanted.pop("until") if text), int(wanted.pop("max_gen_toks"))
        other = {
            key: value for key, value in wanted.items() if key not in _OF_SAMPLING and _GREEDY.get(key, ...) != value
        }
        if other:
            raise ConfigError(
                f"generation_kwargs: adapters are asked greedily, got {other}. Leave that out of the task, or override "
                f"it: --gen_kwargs do_sample=False,temperature=0."
            )
        return num_new, stop

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each target behind its context, and whether it is what would be generated."""
        # Targets that differ in their last token alone, as A, B, C and D do, are answered by one row.
        rows: dict[tuple[Ids, Ids], list[int]] = {}
        num_cut = 0
        for place, (texts, context, target) in enumerate(requests):
            if not 0 < len(target) <= self.max_length:
                raise DataError(
                    f"the continuation {texts[1]!r:.80} has {len(target)} tokens; at least 1 is needed and "
                    f"{self.max_length} fit beside the adapter."
                )
            room = self.max_length + (1 - len(target) if self.backend == "causal" else 0)
            num_cut += len(context) > room
            rows.setdefault((tuple(context[-room:]), tuple(target[:-1])), []).append(place)
        if num_cut:
            log.warning(f"{num_cut} of {len(requests)} contexts lose their start: {self.max_length} tokens fit.")
        items = [
            self._item(index, ids, (*first_ids, requests[places[0]][2][-1]))
            for index, ((ids, first_ids), places) in enumerate(rows.items())
        ]
        targets = [[(place, requests[place][2]) for place in places] for places in rows.values()]
        score = partial(self._scored, self._folded(), targets)
        found = self._computed(items, score, is_packed=self.base.is_packed)
        return [found[place] for place in range(len(requests))]

    def _scored(
        self,
        adapters: Mapping[str, Folded],
        targets: Sequence[Sequence[tuple[int, list[int]]]],
        of_pass: Sequence[Item],
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Results of the targets behind each row, by the place of their request."""
        logits_MV = target_logits(self.base, rows_of(of_pass, adapters))
        if not of_pass:
            return
        for item, logits_TV in zip(of_pass, logits_MV.split([len(item.target_ids) for item in of_pass]), strict=True):
            logp_TV, likeliest_T = logits_TV.log_softmax(-1), logits_TV.argmax(-1)
            for place, ids in targets[item.example.index]:
                ids_T = torch.tensor(ids, device=logits_TV.device)
                logp = float(logp_TV.gather(1, ids_T[:, None]).sum())
                yield place, (logp, bool((likeliest_T == ids_T).all()))

    def _folded(self) -> dict[str, Folded]:
        with torch.no_grad():
            return {} if self.adapter is None else {_NAME: self.adapter.folded()}

    def _item(self, index: int, ids: Ids, target_ids: Ids, num_new_tokens: int = 0) -> Item:
        example = Example(index, ids, target_ids, None, "", has_sides=self.base.is_encoder_decoder)
        if self.adapter is None:
            return Item(BASE_ALONE, 0, example, target_ids, num_new_tokens=num_new_tokens)
        num = self.adapter.num_positions
        of_decoder = num - self.adapter.length
        return Item(_NAME, num, example, target_ids, num_new_tokens=num_new_tokens, decoder_length=of_decoder)

    def _computed(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Iterable[tuple[int, T]]], *, is_packed: bool
    ) -> dict[int, T]:
        """What `compute` finds in the passes of all ranks, by the place of its request."""
        if comm.world_size() > 1 and not comm.is_same(repr(items).encode()):
            raise DataError(f"rank {comm.rank()} was given other requests than another rank; each must have them all.")
        passes = plan_passes(
            items, world=comm.world_size(), microbatch_tokens=self._microbatch_tokens, is_packed=is_packed
        )[comm.rank()]
        found: dict[int, T] = {}
        with self.base.evaluating():
            for of_pass in tqdm(passes, desc="passes", disable=comm.rank() > 0):
                found.update(compute(of_pass))
        return {place: result for part in comm.gather_objects(found) for place, result in part.items()}


def main() -> None:
    """The harness's command line, with `peftscale` among its models."""
    code = 0
    try:
        cli_evaluate()
    except PeftscaleError as error:
        print(redaction.redacted(str(error)), file=sys.stderr)
        code = 2
    if comm.expected_world_size() > 1:
        comm.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()

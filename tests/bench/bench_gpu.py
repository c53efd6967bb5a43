"""A training step on a GPU: ours beside PEFT's prompt tuning with bitsandbytes, over one random NF4 base, in one run.

    python tests/bench/bench_gpu.py --shape 7b [--sst2 DIRECTORY]    # Llama 2's dimensions, on a CUDA device
    python tests/bench/bench_gpu.py --shape 70b --checkpointing
    python tests/bench/bench_gpu.py --tiny                           # anywhere: the logic, no figures

The base is made on the device, blob by blob, and never exists in bfloat16: random bytes are valid NF4, with scales that
give weights a deviation of 0.02. PEFT's side is transformers' model with bitsandbytes' Linear4bit over the very same
bytes. A step is forward and backward of one batch of 32 texts with SST-2's lengths and a target each, prompts of 100
and 20 tokens, bfloat16. Four sides take turns, medians of 7 after two untimed turns: PEFT, our padded pass, our packed
pass with batched attention, and with FlexAttention. `--layers` cuts a base that does not fit.

Figures of a side: text tokens a second (neither padding nor virtual tokens); the share of the device's bfloat16 peak
that 4 x parameters x tokens are, for the tokens that the side computes and the blocks' parameters (a recomputed forward
is no work); peak memory over the base; the prompt's gradient beside PEFT's. The peak is measured, as the best of some
products of two large matrices, unless `--peak-tflops` gives the maker's. A profile of one step of each side ends the
run: where the time goes, and the longest kernels. Appends one BenchRecord a length.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import bitsandbytes
import torch
import typer
from accelerate import init_empty_weights
from peft import PromptTuningConfig, get_peft_model
from random_base import TOKENIZER, llama
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from peftscale import records
from peftscale.adapters import Cohort, SoftPrompt
from peftscale.base import attention, flex_exactness, skeleton
from peftscale.base.linear import Nf4FrozenLinear
from peftscale.base.load import Base, load_tokenizer
from peftscale.config import BaseConfig
from peftscale.data.batches import pass_tokens, training_items
from peftscale.data.tasks import Example
from peftscale.facts import NF4_GROUP
from peftscale.train import memory, step

SHAPES = {
    "7b": llama(hidden=4096, feed=11008, layers=32, heads=32, key_value_heads=32, vocab=32_000),
    "70b": llama(hidden=8192, feed=28672, layers=80, heads=64, key_value_heads=8, vocab=32_000),
    "tiny": llama(hidden=64, feed=176, layers=2, heads=4, key_value_heads=2, vocab=512),
}
NUM_TURNS, NUM_WARM = 7, 2
NUM_TEXTS, LENGTHS = 32, (100, 20)
WEIGHT_STD, SCALE_SPREAD = 0.02, 0.1
LOG_LENGTH = (3.387, 0.497)
"""Mean and deviation of the logarithm of SST-2's lengths, in tokens of the quickstart's tokenizer; shortest 6, longest
106."""
KINDS = {  # of kernels, by what is in their names; the first that fits
    "attention": ("flex", "flash", "fmha", "attention"),
    "dequantising": ("dequant",),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "aten::mm", "aten::addmm", "aten::bmm"),
}
PEFT, PADDED, BATCHED, FLEX = "peft", "padded", "packed", "flex"
TITLES = {PEFT: "PEFT", PADDED: "ours, padded", BATCHED: "ours, packed", FLEX: "ours, FlexAttention"}


@dataclass
class Side:
    """One way to take the same step."""

    name: str
    run: Callable[[], Tensor]
    """Forward and backward; returns the prompt's gradient."""
    num_computed: int
    """Tokens that go through the blocks."""


@dataclass
class Figures:
    """What was measured of a side; `problem` instead, where it could not run."""

    first_s: float = 0.0
    """The first step: libraries choose their kernels."""
    step_s: float = 0.0
    peak_bytes: int = 0
    gradient: Tensor | None = None
    problem: str | None = None


def make_base(config: PretrainedConfig, device: torch.device, *, is_checkpointed: bool) -> Base:
    """A frozen base of random blobs, filled one after the other on the device."""
    made = skeleton.build(copy.deepcopy(config), quantization="nf4", compute_dtype=torch.bfloat16, where="random")
    draw = torch.Generator(device).manual_seed(0)
    model = made.model
    linears = {f"{name}.blob": module for name, module in model.named_modules() if isinstance(module, Nf4FrozenLinear)}
    for name, meta in list(model.named_parameters()):
        values = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        if name in linears:
            fill_blob_(values, linears[name].out_features * linears[name].in_features, draw)
        elif meta.dim() == 1:
            values.fill_(1.0)  # a norm
        else:
            values.normal_(0.0, WEIGHT_STD, generator=draw)
        _set_parameter(model, name, nn.Parameter(values, requires_grad=False))
    model.to(device)  # buffers
    model.config.use_cache = False
    if is_checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return Base(
        model=model,
        tokenizer=load_tokenizer(TOKENIZER),
        digest="random",
        cfg=BaseConfig(
            model="random",
            quantization="nf4",
            compute_dtype="bfloat16",
            sharding="replicated",
            checkpoint_activations=is_checkpointed,
        ),
        device=device,
        compute_dtype=torch.bfloat16,
        is_sharded=False,
        own_attention=model.config._attn_implementation,
    )


def fill_blob_(blob: Tensor, size: int, draw: torch.Generator) -> None:
    """Random values of NF4 and scales near the one that gives weights their deviation. Layout: `base.linear`."""
    code = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    scale = WEIGHT_STD / float(code.square().mean().sqrt())
    num_random = -(-size // 2) - (-size // NF4_GROUP)
    blob[:num_random].random_(0, 256, generator=draw)
    tail = torch.full(((blob.numel() - num_random) // 4,), SCALE_SPREAD * scale)
    tail[-1] = scale  # the offset: nested scales are around it
    blob[num_random:] = tail.view(torch.uint8).to(blob.device)


def make_peft(base: Base, config: PretrainedConfig, length: int, *, is_checkpointed: bool) -> tuple[nn.Module, Tensor]:
    """PEFT's prompt tuning over bitsandbytes' layers that hold the same bytes; and its trained rows."""
    with init_empty_weights(include_buffers=False):
        # A copy: the attention that the other sides switch stands in the config.
        config = copy.deepcopy(config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=base.own_attention)
    model.to(torch.bfloat16)
    for name, ours in base.model.named_modules():
        if isinstance(ours, Nf4FrozenLinear):
            layer = bitsandbytes.nn.Linear4bit(
                ours.in_features,
                ours.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed, state = ours.packed_and_state(torch.bfloat16)
            layer.weight = bitsandbytes.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
            )
            layer.quant_state = state
            model.set_submodule(name, layer)
    for name, parameter in base.model.named_parameters():
        if not name.endswith(".blob"):
            _set_parameter(model, name, parameter)
    for name, buffer in base.model.named_buffers():
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, buffer)
    model.config.use_cache = False
    if is_checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    tuned.prompt_encoder.to(base.device)
    tuned.train()
    return tuned, next(parameter for parameter in tuned.parameters() if parameter.requires_grad)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, parameter)


def text_lengths(sst2: Path | None, base: Base) -> list[int]:
    """Input tokens of the first texts of SST-2, or of as many drawn from the distribution of its lengths."""
    if sst2 is None:
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randn(NUM_TEXTS, generator=draw).mul(LOG_LENGTH[1]).add(LOG_LENGTH[0]).exp()
        return [int(length) for length in lengths.round().clamp(6, 106)]
    lines = (sst2 / "stsa.binary.train").read_text(errors="replace").splitlines()[:NUM_TEXTS]
    return [len(base.tokenizer(f"{line[2:].strip()}\nRating:")["input_ids"]) for line in lines]


def make_examples(lengths: Sequence[int], vocab: int) -> list[Example]:
    """Random tokens: a base of random weights reads nothing in them. One target each."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, vocab, (length + 1,), generator=draw).tolist() for length in lengths]
    return [Example(i, tuple(text[:-1]), (text[-1],), None, "") for i, text in enumerate(texts)]


def ours(base: Base, examples: list[Example], rows_PH: Tensor, name: str) -> Side:
    """A step through the training path."""
    cohort = Cohort({"p": SoftPrompt(rows_PH)})
    items = training_items("p", len(rows_PH), examples)
    is_packed = name != PADDED
    way = {PADDED: base.own_attention, BATCHED: attention.NAME, FLEX: attention.FLEX}[name]

    def run() -> Tensor:
        base.is_packed, base.model.config._attn_implementation = is_packed, way
        cohort["p"].rows_PH.grad = None
        step.gradient(base, cohort, items, microbatch_tokens=10**9)
        grad = cohort["p"].rows_PH.grad
        assert grad is not None
        return grad

    return Side(name, run, pass_tokens(items, is_packed=is_packed))


def pefts(
    base: Base, config: PretrainedConfig, examples: list[Example], rows_PH: Tensor, *, is_checkpointed: bool
) -> Side:
    """A step of PEFT's on the same padded batch."""
    tuned, weight = make_peft(base, config, len(rows_PH), is_checkpointed=is_checkpointed)
    weight.data.copy_(rows_PH)
    texts = [[*example.input_ids, *example.target_ids] for example in examples]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=base.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=base.device)
    labels = torch.full_like(ids, -100)
    for i, (text, example) in enumerate(zip(texts, examples, strict=True)):
        labels[i, len(text) - 1 : len(text)] = torch.tensor(example.target_ids)

    def run() -> Tensor:
        weight.grad = None
        tuned(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        assert weight.grad is not None
        return weight.grad

    return Side(PEFT, run, len(texts) * (width + len(rows_PH)))


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(sides: Sequence[Side], device: torch.device) -> dict[str, Figures]:
    """First step, gradient and memory of each side alone, then medians of turns taken by all of them."""
    found = {side.name: Figures() for side in sides}
    for side in sides:
        figures = found[side.name]
        try:
            figures.first_s = _seconds(side.run, device)
            with memory.measured(device) as peak:
                figures.gradient = side.run().detach().float().cpu().clone()
                figures.peak_bytes = peak.peak_bytes()
            for _ in range(NUM_WARM - 1):
                _seconds(side.run, device)
        except torch.OutOfMemoryError:
            figures.problem = "out of memory"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(NUM_TURNS):
        for side in sides:
            if found[side.name].problem is None:
                seconds[side.name].append(_seconds(side.run, device))
    for name, values in seconds.items():
        found[name].step_s = statistics.median(values) if values else 0.0
    return found


def peak_flops(device: torch.device) -> float:
    """Operations a second of bfloat16 products of large square matrices, the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b, device) for _ in range(10))


def show_profile(side: Side, device: torch.device) -> None:
    """Where the time of one step goes."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as recorded:
        _seconds(side.run, device)
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    averages = recorded.key_averages()
    kernels = [event for event in averages if not is_cuda or event.device_type.name == "CUDA"]
    microseconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in kernels:
        kind = next((kind for kind, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "the rest")
        microseconds[kind] += getattr(event, key)
    total = sum(microseconds.values())
    shares = ", ".join(f"{kind} {time_us / total:.0%}" for kind, time_us in microseconds.items())
    print(f"\n{TITLES[side.name]}: {total / 1e3:.1f} ms of {'kernels' if is_cuda else 'operators'}: {shares}\n")
    print("| ms | calls | name |\n|---|---|---|")
    for event in sorted(kernels, key=lambda event: -getattr(event, key))[:12]:
        print(f"| {getattr(event, key) / 1e3:.2f} | {event.count} | {event.key[:90]} |")


def report(
    side: Side, figures: Figures, *, want: Tensor | None, num_text: int, num_parameters: int, peak: float
) -> dict[str, int | float]:
    """Print a row of the table; return what goes into the record."""
    if figures.problem is not None:
        print(f"| {TITLES[side.name]} | {figures.problem} | | | | | | |", flush=True)
        return {}
    assert figures.gradient is not None
    tokens_per_s = num_text / figures.step_s
    share = 4 * num_parameters * side.num_computed / figures.step_s / peak
    difference = 0.0 if want is None else float((figures.gradient - want).norm() / want.norm())
    print(
        f"| {TITLES[side.name]} | {figures.step_s * 1e3:.1f} | {tokens_per_s:,.0f} | {side.num_computed:,} | "
        f"{share:.1%} | {figures.peak_bytes / 1e9:.2f} | {figures.first_s:.1f} | {difference:.1e} |",
        flush=True,
    )
    return {
        "step_s": figures.step_s,
        "first_step_s": figures.first_s,
        "text_tokens_per_s": tokens_per_s,
        "computed_tokens": side.num_computed,
        "share_of_peak": share,
        "peak_bytes_over_base": figures.peak_bytes,
        "gradient_difference": difference,
    }


def compare(
    base: Base, config: PretrainedConfig, length: int, lengths: Sequence[int], *, name: str, peak: float, out: Path
) -> None:
    """All sides at one length of the prompt."""
    is_checkpointed = base.cfg.checkpoint_activations
    examples = make_examples(lengths, config.vocab_size)
    draw = torch.Generator().manual_seed(1)
    rows_PH = torch.randn(length, base.hidden_size, generator=draw).mul(WEIGHT_STD).to(base.device)
    start = time.perf_counter()
    why_not = flex_exactness.flex_differs(base) if base.device.type == "cuda" else "it has no backward on the CPU"
    checked_s = time.perf_counter() - start
    names = [PADDED, BATCHED, *([FLEX] if why_not is None else [])]
    sides = [pefts(base, config, examples, rows_PH, is_checkpointed=is_checkpointed)]
    sides += [ours(base, examples, rows_PH, name) for name in names]
    found = measure(sides, base.device)
    num_text = sum(lengths) + len(lengths)
    num_parameters = sum(
        module.out_features * module.in_features
        for module in base.model.modules()
        if isinstance(module, Nf4FrozenLinear)
    )
    print(f"\nprompt of {length}, {len(lengths)} texts, {num_text} text tokens")
    print(f"FlexAttention: {why_not or f'checked in {checked_s:.1f} s, the first time with its compilation'}\n")
    print(
        "| side | step, ms | text tokens/s | computed | of peak | memory over the base, GB | first step, s | gradient |"
    )
    print("|---|---|---|---|---|---|---|---|")
    measured: dict[str, int | float] = {"num_parameters": num_parameters, "text_tokens": num_text, "peak_flops": peak}
    for side in sides:
        figures = report(
            side,
            found[side.name],
            want=found[PEFT].gradient,
            num_text=num_text,
            num_parameters=num_parameters,
            peak=peak,
        )
        measured |= {f"{side.name}_{key}": value for key, value in figures.items()}
    record_name = f"gpu-{name}-{length}{'-checkpointed' if is_checkpointed else ''}"
    environment = records.environment()
    record = records.BenchRecord(name=record_name, config_fingerprint=None, measured=measured, environment=environment)
    records.append(out, record)
    for side in sides:
        if found[side.name].problem is None:
            show_profile(side, base.device)


def main(
    out: Annotated[Path, typer.Argument(help="The records are appended to it.")] = Path("bench.jsonl"),
    shape: Annotated[str, typer.Option(help="7b or 70b.")] = "7b",
    layers: Annotated[int | None, typer.Option(help="Blocks, where not all of them fit.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again, both sides.")
    ] = False,
    sst2: Annotated[
        Path | None, typer.Option(help="Directory of stsa.binary.train; lengths are drawn without.")
    ] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="The device's bfloat16 peak; measured without.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A base of two small blocks, on any device.")] = False,
) -> None:
    """Make the base, then compare at each length."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        print("no CUDA device here: the tiny setting, on the CPU. Its figures mean nothing.")
        tiny = True
    name = "tiny" if tiny else shape
    content = {**SHAPES[name], **({} if layers is None else {"num_hidden_layers": layers})}
    config = AutoConfig.for_model(**content)
    base = make_base(config, device, is_checkpointed=checkpointing)
    held = sum(parameter.nbytes for parameter in base.model.parameters())
    peak = peak_flops(device) if peak_tflops is None else peak_tflops * 1e12
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(
        f"{name}: {config.num_hidden_layers} blocks, hidden size {config.hidden_size}, {held / 1e9:.2f} GB on {where}; "
        f"peak {peak / 1e12:.1f} TFLOP/s ({'measured' if peak_tflops is None else 'given'}); "
        f"checkpointing {'on' if checkpointing else 'off'}; lengths {'drawn' if sst2 is None else 'of SST-2'}"
    )
    lengths = text_lengths(sst2, base)
    for length in LENGTHS:
        compare(base, config, length, lengths, name=name, peak=peak, out=out)


if __name__ == "__main__":
    typer.run(main)

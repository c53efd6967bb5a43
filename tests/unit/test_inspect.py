"""`peftscale inspect` with a base: neighbours in the shipped one, the start made again, what a prefix has instead."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from torch import Tensor

from peftscale import configio
from peftscale.adapters import Folded, Prefix, SoftPrompt, files
from peftscale.adapters.manifest import AdapterCard, BaseCard, StartCard, TaskTemplate
from peftscale.analysis import picture, reading, vocabulary
from peftscale.analysis.vocabulary import Vocabulary
from peftscale.base import load, pack, prefixed
from peftscale.config import BaseConfig, SoftPromptConfig

pytest.importorskip("matplotlib", reason="matplotlib is an extra")
RUN_FILE = tiny.QUICKSTART.parent / "quickstart.yaml"
STARTS: list[dict[str, Any]] = [
    {"init": "random"},
    {"init": "scaled"},
    {"init": "vocabulary", "init_top": 300},
    {"init": "text", "init_text": "Rate this film from terrible to great"},
    {"init": "labels", "init_labels": [" terrible", " absolutely great"]},
    {"init": "vocabulary", "reparam": "residual", "reparam_hidden_size": 6},
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory, and a cache in which nothing is packed."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("inspect")
        patch.setenv("PEFTSCALE_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def words(here: Path) -> Vocabulary:
    """The shipped base's."""
    return vocabulary.load(configio.load(RUN_FILE).base)


def _rows(words: Vocabulary, *texts: str) -> Tensor:
    ids = [words.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(len(one) == 1 for one in ids), ids
    return words.embedding_rows(torch.tensor([one[0] for one in ids]))


def _save(directory: Path, adapter: Folded, **more: Any) -> Path:
    cfg = configio.load(RUN_FILE)
    model_dir = Path(cfg.base.model)
    config = load.make_skeleton(cfg.base, model_dir).model.config
    digest = more.pop("digest", "sha256:" + "0" * 64)
    card = AdapterCard(
        base=BaseCard.of(cfg.base, digest, config),
        task=TaskTemplate.of(cfg.task),
        run="run",
        fingerprint="f",
        init="labels",
        step=3,
        **more,
    )
    files.save(adapter, directory, card=card)
    return directory


def _inspect(*arguments: str | Path) -> tuple[dict[str, Any], str]:
    done = commands.run("inspect", *arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found, done.err


def test_each_virtual_token_is_named_by_the_word_it_points_at(here: Path, words: Vocabulary) -> None:
    good, film, one = _rows(words, " good", " film", " one")
    rows_PH = torch.stack([7 * good, film + 0.3 * one, -good])
    found, told = _inspect(_save(here / "named", SoftPrompt(rows_PH)), RUN_FILE, "-k", "4")
    reading = found["reading"]
    near = [[one["text"] for one in token["neighbours"]] for token in reading["tokens"]]
    assert [len(texts) for texts in near] == [4, 4, 4]
    assert all(set(token["family"]) <= set(texts) for token, texts in zip(reading["tokens"], near, strict=True))
    assert (near[0][0], near[1][0]) == (" good", " film")
    assert reading["tokens"][0]["neighbours"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert " good" not in near[2]
    assert reading["tokens"][0]["norm"] == pytest.approx(float(7 * good.norm()), rel=1e-5)
    assert reading["prompt"]["labels"]["good"] == [0]
    assert reading["prompt"]["labels_found"] == sum(map(bool, reading["prompt"]["labels"].values())) / 4
    assert "base not verified (it was never packed here)" in told
    assert "start: not known (peftscale.json does not say it)" in told
    assert found["length"] == 3  # what it says without a base is there too


def test_the_random_control_has_equal_norms_and_names_nothing(here: Path, words: Vocabulary) -> None:
    texts = (" terrible", " bad", " good", " great", " film", " story", " people", " water")
    found, _ = _inspect(_save(here / "control", SoftPrompt(_rows(words, *texts))), RUN_FILE)
    prompt, control = found["reading"]["prompt"], found["reading"]["control"]
    assert prompt["norm"] == pytest.approx(control["norm"], rel=1e-5)
    assert prompt["nearest_cosine"] > 0.999
    assert control["nearest_cosine"] < 0.3  # measured 0.19
    assert prompt["tightness"] > control["tightness"] + 0.1  # measured 0.45 and 0.23
    assert (prompt["labels_found"], control["labels_found"]) == (1.0, 0.0)


@pytest.mark.parametrize("start", STARTS, ids=lambda start: "-".join(map(str, list(start.values())[:2])).split()[0])
def test_the_start_is_made_again_from_what_the_adapter_says(
    here: Path, words: Vocabulary, start: dict[str, Any]
) -> None:
    from peftscale import adapters

    cfg = SoftPromptConfig.model_validate_json(json.dumps({"kind": "prompt", "length": 5, "seed": 4, **start}))
    with torch.no_grad():
        start_PH = adapters.starting_prompt(cfg, words, seed=4, where="start").folded().values.detach()
    moved_PH = start_PH + torch.tensor([[3.0]] + [[0.0]] * 4) * torch.eye(5, 256)
    card = StartCard.of(cfg, seed=4, values=start_PH)
    found, told = _inspect(_save(here / "again", SoftPrompt(moved_PH), start=card), RUN_FILE)
    assert [token["moved"] for token in found["reading"]["tokens"]] == pytest.approx([3, 0, 0, 0, 0], abs=1e-5)
    assert found["reading"]["prompt"]["moved"] == pytest.approx(0.6, abs=1e-5)
    assert "start:" not in told
    if start["init"] == "labels":
        assert found["reading"]["tokens"][0]["start"] == " terrible"
        assert found["reading"]["tokens"][0]["start_cosine"] == pytest.approx(1, abs=1e-5)


def test_a_start_that_comes_out_otherwise_is_not_taken_for_the_start(here: Path, words: Vocabulary) -> None:
    rows_PH = _rows(words, " good", " bad")
    cfg = SoftPromptConfig(kind="prompt", length=2, init="labels", init_labels=(" good", " bad"), seed=0)
    card = StartCard.of(cfg, seed=0, values=rows_PH)
    other = card.model_copy(update={"norm": card.norm * 1.01})
    found, told = _inspect(_save(here / "otherwise", SoftPrompt(rows_PH), start=other), RUN_FILE)
    assert f"start: cannot be made again: its norm was {other.norm:.6g} and comes out as {card.norm:.6g}" in told
    assert "moved" not in found["reading"]["prompt"]
    newer = card.model_copy(update={"settings": {**card.settings, "init": "dreamt"}})
    _, told = _inspect(_save(here / "newer", SoftPrompt(rows_PH), start=newer), RUN_FILE)
    assert "start: its settings are those of another version of peftscale" in told


def test_an_adapter_of_another_base_is_refused_once_the_base_is_packed(here: Path, words: Vocabulary) -> None:
    directory = _save(here / "other", SoftPrompt(_rows(words, " good")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTSCALE_CACHE", str(here / "packed"))
        digest = load.open_(configio.load(RUN_FILE).base).packed.digest
        done = commands.run("inspect", directory, RUN_FILE)
        assert done.code == 2
        assert f"was trained on base sha256:{'0' * 64}, this base is {digest}" in done.err
        _, told = _inspect(_save(here / "own", SoftPrompt(_rows(words, " good")), digest=digest), RUN_FILE)
        assert "not verified" not in told


@pytest.mark.parametrize(("quantization", "compute_dtype"), [("nf4", "float32"), ("none", "bfloat16")])
def test_the_pack_and_the_weights_give_the_rows_that_the_loaded_base_embeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any, compute_dtype: Any
) -> None:
    monkeypatch.setenv("PEFTSCALE_CACHE", str(tmp_path / "cache"))
    for name, config in (("llama", tiny.LLAMA), ("gpt2", tiny.GPT2), ("t5", tiny.T5)):
        cfg = BaseConfig(
            model=str(tiny.save_base(tmp_path / name, config)),
            quantization=quantization,
            compute_dtype=compute_dtype,
            sharding="replicated",
            checkpoint_activations=False,
        )
        unpacked = vocabulary.load(cfg)
        assert unpacked.digest is None
        base = load.load(cfg, sharding="replicated", device=torch.device("cpu"))
        packed = vocabulary.load(cfg)
        assert packed.digest == base.digest
        ids = torch.tensor([0, 5, 4095])
        for found in (unpacked, packed):
            assert torch.equal(found.embedding_rows(ids), base.embedding_rows(ids))
            assert (found.vocab_size, found.hidden_size) == (base.vocab_size, base.hidden_size)


def test_one_tensor_of_the_base_is_read_and_no_other(here: Path, words: Vocabulary) -> None:
    directory = _save(here / "one", SoftPrompt(_rows(words, " good")))
    read: list[str] = []
    source_read = pack.SafetensorsSource.read

    def counting(self: pack.SafetensorsSource, name: str) -> Tensor:
        read.append(name)
        return source_read(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.SafetensorsSource, "read", counting)
        _inspect(directory, RUN_FILE)
    assert read == ["model.embed_tokens.weight"]
    assert not (here / "cache").exists()  # and nothing was packed for it


def test_the_picture_is_a_png_of_prompt_start_and_neighbours(here: Path, words: Vocabulary) -> None:
    labels = (" good", " bad", " film", " story")
    cfg = SoftPromptConfig(kind="prompt", length=4, init="labels", init_labels=labels, seed=0)
    start_PH = _rows(words, *labels)
    directory = _save(here / "drawn", SoftPrompt(start_PH.flip(0)), start=StartCard.of(cfg, seed=0, values=start_PH))
    _inspect(directory, RUN_FILE, "--png", here / "map.png")
    assert (here / "map.png").read_bytes().startswith(b"\x89PNG")
    single = _save(here / "single", SoftPrompt(start_PH[:1]))
    _inspect(single, RUN_FILE, "-k", "2", "--png", here / "single.png")


def test_the_picture_joins_each_token_with_its_start_and_names_its_nearest_word(words: Vocabulary) -> None:
    from matplotlib.figure import Figure

    # Of the 90 words that are neighbours of these rows 60 have a name, and the far rows' are among them.
    far_PH = torch.randn(18, 256, generator=torch.Generator().manual_seed(0))
    rows_PH = torch.cat([_rows(words, " good", " bad"), far_PH])
    read = reading.beside(words, rows_PH, rows_PH.flip(0), labels={}, k=5, notes=[])
    axes = Figure().subplots()
    picture.draw(read, axes, title="title")
    shown = [text.get_text() for text in axes.texts]
    nearest = [texts[0].strip() for texts in read.prompt.texts_PK]
    assert shown[:20] == [str(row) for row in range(20)]
    assert set(nearest) <= set(shown[20:])
    assert len(shown) == 20 + 60
    assert len(axes.lines) == 40
    assert axes.get_title() == "title"
    assert [text.get_text() for text in axes.get_legend().get_texts()][1:] == ["start", "virtual token"]


def test_few_points_of_one_direction_are_drawn_at_one_place() -> None:
    rows = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    points = picture.plane(rows)
    assert torch.allclose(points[0], points[1], atol=1e-6)
    assert (points[1] - points[2]).norm() == pytest.approx(2**0.5, rel=1e-5)


def test_a_prefix_has_norms_layer_by_layer_and_no_neighbours(here: Path, words: Vocabulary) -> None:
    cfg = configio.load(RUN_FILE)
    shape = prefixed.shape_of(load.make_skeleton(cfg.base, Path(cfg.base.model)).model.config)
    values_L2PKD = torch.zeros(shape.num_layers, 2, 3, shape.num_kv_heads, shape.head_dim)
    values_L2PKD[1, 0, ..., 0], values_L2PKD[2, 1, ..., :2] = 5, 1
    directory = _save(here / "prefix", Prefix(values_L2PKD))
    found, told = _inspect(directory, RUN_FILE)
    layers = found["reading"]["layers"]
    assert len(layers) == shape.num_layers
    assert (layers[0], layers[1]) == ({"layer": 0, "keys": 0, "values": 0}, {"layer": 1, "keys": 5, "values": 0})
    assert layers[2]["values"] == pytest.approx(2**0.5)
    assert "have no neighbours in the vocabulary" in told
    assert commands.run("inspect", directory, RUN_FILE).code == 0
    done = commands.run("inspect", directory, RUN_FILE, "--png", here / "no.png")
    assert (done.code, (here / "no.png").exists()) == (2, False)
    assert "--png: a prefix has no neighbours in the vocabulary to be drawn among" in done.err


def test_the_base_is_named_once_and_what_cannot_be_drawn_or_written_is_refused(here: Path, words: Vocabulary) -> None:
    directory = _save(here / "refused", SoftPrompt(_rows(words, " good")))
    model = tiny.QUICKSTART / "base"
    by_model, _ = _inspect(directory, "--base", model)
    by_run, _ = _inspect(directory, RUN_FILE)
    assert by_model["reading"] == by_run["reading"]
    for arguments, message in (
        ([RUN_FILE, "--base", model], "takes its base from a run file or --base: name one"),
        (["--png", here / "x.png"], "takes its base from a run file or --base: name one"),
        (["-k", "7"], "takes its base from a run file or --base: name one"),
        ([RUN_FILE, "-k", "101"], "Invalid value for '--neighbours'"),
        ([RUN_FILE, "--png", here / "nowhere" / "x.png"], "x.png: cannot be written (No such file or directory)"),
    ):
        done = commands.run("inspect", directory, *arguments)
        assert (done.code, done.out) == (2, "")
        assert message in done.err


def test_tables_name_words_that_look_like_markup_as_they_are(here: Path, words: Vocabulary) -> None:
    done = commands.run("inspect", _save(here / "shown", SoftPrompt(_rows(words, "]", " good"))), RUN_FILE)
    assert (done.code, done.out) == (0, "")
    for text in ("virtual tokens and their nearest words by cosine", "' good' 1.00", "']' 1.00", "nearest cosine"):
        assert text in done.err
    assert "' good'" in done.err.split("labels: ")[1].split("metrics: ")[0]  # with the blank that is part of it
    assert "None" not in done.err


def test_without_matplotlib_the_message_says_what_to_install(here: Path, words: Vocabulary) -> None:
    directory = _save(here / "without", SoftPrompt(_rows(words, " good")))
    done = commands.run_alone(
        "inspect",
        directory,
        RUN_FILE,
        "--png",
        here / "x.png",
        before="import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None",
    )
    assert done.code == 2
    assert "--png: needs matplotlib. Install it with: pip install 'peftscale[plots]'." in done.err

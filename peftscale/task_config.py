"""Section of a run file that says what is learnt: a task's data, its templates and its metrics.

The other sections and the whole file are `config`, which hands this on. Reading the data is `data`. Nothing here
imports torch.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from peftscale.errors import ConfigError
from peftscale.train_config import Frozen

Split = Literal["train", "validation", "test"]
LabelMetric = Literal["accuracy", "f1", "macro_f1", "group_exact_match"]
TextMetric = Literal["squad_f1", "squad_exact_match", "referent_accuracy", "bleu"]
Metric = Literal[LabelMetric, TextMetric, "exact_match", "mean"]


class DataFiles(Frozen):
    """Local files of one data set: jsonl, csv or parquet, by their suffix."""

    train: Path
    validation: Path
    test: Path | None = None


class HubData(Frozen):
    """A data set of the hub, in splits called train, validation and (optional) test."""

    path: str
    subset: str | None = None
    """Its name, or its directory in the hub's own conversion of a data set that is a script."""
    revision: str = "main"
    """Branch, tag or commit; refs/convert/parquet is the branch of those conversions."""
    train: str = "train"
    """Name of the split, slices allowed: train[:90%]."""
    validation: str = "validation"
    test: str | None = None


class TaskConfig(Frozen):
    """Text in, text out: which columns make the text that is read and the text that is to be written.

    A task that gives `input`, `target` and `metrics` is complete. Another takes what it leaves out from the catalogue's
    task of its name (`peftscale tasks`), and `files` stand in place of its `hub`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Used in reports and kept with the adapter. One of the catalogue, or of your own."""
    files: DataFiles | None = None
    hub: HubData | None = None
    each: dict[str, str] = Field(default_factory=dict)
    """Name -> Jinja expression for a list. A row becomes one row for each entry, which is a column of that name; later
    expressions may use earlier names: {question: passage.questions, answer: question.answers}."""
    input: str
    """Jinja template over the columns: the text that the base reads."""
    cue: str = ""
    """Text behind the input, whose last blanks it replaces, to say that the target comes next. An encoder-decoder reads
    the input without it."""
    target: str
    """Jinja template over the columns: the text to be written, or the key into `labels`."""
    references: str | None = None
    """Jinja expression for a list: all right answers, where there are several. `target` then renders one of them,
    called `reference`. Training sees each as an example of its own, evaluation holds one prediction against all."""
    group: str | None = None
    """Jinja expression. With labels: rows with equal values are answers to one question (group_exact_match). Without:
    rows of an evaluation with equal values are one example, with the references of all of them."""
    target_holds: str | None = None
    """Jinja expression for true or false: whether the target is the right one. Where it is not, the row is left out of
    training, and referent_accuracy asks for another text."""
    labels: dict[str, str] | None = None
    """Rendered target -> the words that stand for it. Given: classification by the likelihood of those words.
    Left out: the target itself is written by greedy generation."""
    metrics: tuple[Metric, ...] = Field(min_length=1)
    """The first one decides which adapter is the best. f1: of the last label; squad_f1, squad_exact_match: of the words
    as SQuAD normalises them; mean: of the other metrics. All between 0 and 1, bleu too."""
    max_text_tokens: PositiveInt | None = None
    """Longer inputs are cut, and the run says how many. Left out: they are refused."""
    cut: Literal["start", "end"] = "start"
    """Where a longer input loses its tokens. The cue stays."""
    max_target_tokens: PositiveInt = 64
    """Longest text that is generated. Unit: tokens."""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if (self.files is None) == (self.hub is None):
            got = "neither" if self.files is None else "both"
            raise ValueError(f"files, hub: exactly one of the two must be given, got {got}")
        return self

    @model_validator(mode="after")
    def keys_belong_together(self) -> Self:
        if self.labels is None:
            if "reference" in self.each:
                raise ValueError(
                    f"each: reference is the name of one of `references`; choose another for {self.each['reference']!r}"
                )
        elif len(self.labels) < 2 or len(set(self.labels.values())) != len(self.labels):
            raise ValueError(f"labels: need at least two different words, got {list(self.labels.values())}")
        elif self.references is not None or self.target_holds is not None:
            raise ValueError(
                f"references, target_holds: belong to a text that is generated, and this task has the labels "
                f"{', '.join(self.labels)}; got references={self.references!r}, target_holds={self.target_holds!r}"
            )
        if (self.target_holds is not None) != ("referent_accuracy" in self.metrics):
            raise ValueError(
                f"metrics: referent_accuracy needs target_holds, and target_holds needs it; got "
                f"{', '.join(self.metrics)} and target_holds={self.target_holds!r}"
            )
        return self

    @model_validator(mode="after")
    def metrics_fit_the_target(self) -> Self:
        takes, refuses = (TextMetric, LabelMetric) if self.labels is None else (LabelMetric, TextMetric)
        wrong = [metric for metric in self.metrics if metric in get_args(refuses)]
        known = ", ".join(("exact_match", *get_args(takes)))
        if wrong and self.labels is None:
            raise ValueError(f"metrics: {', '.join(wrong)} need(s) `labels`; a generated text is scored by {known}")
        if wrong:
            raise ValueError(f"metrics: {', '.join(wrong)} score(s) a generated text; labels are scored by {known}")
        if "f1" in self.metrics and self.labels is not None and len(self.labels) != 2:
            raise ValueError(f"metrics: f1 needs two labels, got {len(self.labels)}; macro_f1 takes any number")
        if "group_exact_match" in self.metrics and self.group is None:
            raise ValueError(
                f"metrics: group_exact_match needs `group`, which says what belongs together; got "
                f"{', '.join(self.metrics)} and no group"
            )
        if len(set(self.metrics)) != len(self.metrics) or ("mean" in self.metrics and len(self.metrics) < 3):
            raise ValueError(f"metrics: each once, and mean beside two others at least; got {', '.join(self.metrics)}")
        return self

    @property
    def reported_split(self) -> Split:
        """What results are given on: the test split where there is one."""
        data = self.files or self.hub
        return "test" if data is not None and data.test is not None else "validation"


def refuse_without(tasks: Iterable[TaskConfig], split: Split | None, *, where: str) -> None:
    """Refuse tasks that lack a split.

    Args:
        tasks: to be scored.
        split: None where each is scored on its `reported_split`.
        where: it was given, for the message.

    Raises:
        ConfigError: `split` is "test" and a task has none.
    """
    lacking = [task.name for task in tasks if split == "test" and task.reported_split != "test"]
    if lacking:
        raise ConfigError(
            f"{where} test: task {lacking[0]} has no test split. Give task.files.test or task.hub.test, or leave "
            f"{where} out: then tasks without one are scored on validation."
        )


def told_apart(tasks: Iterable[TaskConfig], *, where: str) -> list[TaskConfig]:
    """Each task once, in order.

    Args:
        tasks: equal ones may be there again.
        where: they were given, for the message.

    Raises:
        ConfigError: two different ones of one name, by which scores are told apart.
    """
    by_name: dict[str, TaskConfig] = {}
    for task in tasks:
        if by_name.setdefault(task.name, task) != task:
            raise ConfigError(
                f"{where}: two different tasks are called {task.name!r}, and scores are told apart by it. Give one of "
                f"them another task.name."
            )
    return list(by_name.values())

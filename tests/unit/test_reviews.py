"""The quickstart's data is what its card says: original, balanced, and without repeats within or across splits."""

import json
import re
from collections import Counter, defaultdict

import tiny

SPLITS = ("train", "validation", "test")
Rows = list[dict[str, str]]


def _load() -> dict[str, Rows]:
    folder = tiny.QUICKSTART / "reviews"
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()] for split in SPLITS}


def _problems(splits: dict[str, Rows]) -> list[str]:
    """What breaks the rules: repeated texts, and sequences of six words in more than three sentences or two splits."""
    texts = Counter(row["text"].lower() for rows in splits.values() for row in rows)
    found = [f"repeated: {text}" for text, count in texts.items() if count > 1]
    where: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for split, rows in splits.items():
        for row in rows:
            words = re.findall(r"[a-z0-9']+", row["text"].lower())
            for sequence in {tuple(words[i : i + 6]) for i in range(len(words) - 5)}:
                where[sequence].append(split)
    found += [f"in {len(at)} sentences: {' '.join(words)}" for words, at in where.items() if len(at) > 3]
    return found + [f"in splits {set(at)}: {' '.join(words)}" for words, at in where.items() if len(set(at)) > 1]


def test_there_are_at_least_six_hundred_sentences_balanced_over_four_grades_in_every_split() -> None:
    splits = _load()
    assert sum(map(len, splits.values())) >= 600
    for rows in splits.values():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == {"terrible", "bad", "good", "great"}
        assert len(set(counts.values())) == 1


def test_no_six_words_are_in_more_than_three_sentences_and_none_across_splits() -> None:
    assert _problems(_load()) == []


def test_a_planted_repeat_is_found() -> None:
    """Negative control, one for each rule."""
    splits = _load()
    words = splits["train"][0]["text"]
    splits["test"].append({"text": f"Well now, {words}", "label": "bad"})
    assert any(problem.startswith("in splits") for problem in _problems(splits))
    splits = _load()
    splits["train"] += [{"text": f"{start} {words}", "label": "bad"} for start in ("Oh,", "Hm,", "So,")]
    assert any(problem.startswith("in 4 sentences") for problem in _problems(splits))
    splits = _load()
    splits["test"].append(splits["test"][0])
    assert any(problem.startswith("repeated") for problem in _problems(splits))

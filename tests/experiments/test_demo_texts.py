"""Texts of the demonstration: answers recomputed from the prompts, lengths compared with the histograms."""

import json
import re
from datetime import datetime

import numpy as np
import pytest

from experiments.demo_texts import DEMO_DATASETS, write_demo_texts
from muxtune.data.histograms import load_length_histogram
from muxtune.support.errors import SpecError
from tests.sampling import examples

EXAMPLES = examples(2000)
"""Many, so that the mean of a heavy-tailed distribution settles (see the tolerance of the test on means)."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_demo_texts(tmp_path_factory.mktemp("demo"), examples_per_task=EXAMPLES)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def lengths_tokens(path):
    """Bytes of prompt and completion, and BOS and EOS."""
    return np.array([2 + len((e["prompt"] + e["completion"]).encode()) for e in read(path)])


def solve_sum(prompt):
    """``50-8-3=``: read by another way than it was built, as signed terms."""
    return str(sum(int(term) for term in re.findall(r"[+-]?\d+", prompt)))


def parse_date(prompt):
    """The only date in the text; strptime knows months in the C locale, in which Python starts."""
    day_first = re.search(r"(\d{1,2}) ([A-Z][a-z]{2})[a-z]*(?: (\d{4}))?(?: =>|=)$", prompt)
    month_first = re.search(r"([A-Z][a-z]{2})[a-z]* (\d{1,2}), (\d{4})(?: =>|=)$", prompt)
    if month_first:
        month, day, year = month_first.groups()
    else:
        day, month, year = day_first.groups()
    return datetime.strptime(f"{day} {month} {year or 2000}", "%d %b %Y")


def solve_quarter(prompt):
    month = parse_date(prompt).month
    return next(f"Q{i}" for i, last in enumerate((3, 6, 9, 12), start=1) if month <= last)


def solve_iso(prompt):
    return parse_date(prompt).strftime("%Y-%m-%d")


def words_between(prompt, start):
    return re.fullmatch(rf"{start}: ((?:[a-z]+ )+)=>", prompt).group(1).split()


def parse_table(prompt):
    *rows, question = prompt.split("\n")
    table = [row.split(" ") for row in rows]
    assert len({key for key, _ in table}) == len(table) >= 2
    return [(key, int(value)) for key, value in table], question.removesuffix(" =>")


def solve_lookup(prompt):
    table, asked = parse_table(prompt)
    (answer,) = [value for key, value in table if key == asked]
    return str(answer)


def solve_maximum(prompt):
    table, asked = parse_table(prompt)
    assert asked == "most"
    ranked = sorted(table, key=lambda row: row[1])
    assert ranked[-1][1] > ranked[-2][1]  # no tie, so the answer is the only one
    return ranked[-1][0]


SOLVERS = {
    "add": solve_sum,
    "subtract": solve_sum,
    "date_quarter": solve_quarter,
    "date_iso": solve_iso,
    "sort_words": lambda prompt: " ".join(sorted(words_between(prompt, "sort"))),
    "sort_first": lambda prompt: sorted(words_between(prompt, "first of"))[0],
    "table_lookup": solve_lookup,
    "table_maximum": solve_maximum,
}


def test_every_dataset_has_a_solver_and_a_file(files):
    assert list(files) == list(DEMO_DATASETS) == list(SOLVERS)
    assert all(path.name == f"{name}.jsonl" for name, path in files.items())


@pytest.mark.parametrize("name", SOLVERS)
def test_answers_follow_from_their_prompts(files, name):
    examples = read(files[name])
    assert len(examples) == EXAMPLES
    for example in examples:
        assert set(example) == {"prompt", "completion"}
        assert example["completion"] == SOLVERS[name](example["prompt"]), example["prompt"]


@pytest.mark.parametrize("name", ["date_quarter", "date_iso"])
def test_a_weekday_in_a_prompt_is_that_of_its_date(files, name):
    with_weekday = [e["prompt"] for e in read(files[name]) if "day, " in e["prompt"]]
    assert with_weekday
    for prompt in with_weekday:
        weekday = re.search(r"(\w+day), ", prompt).group(1)
        assert weekday == parse_date(prompt).strftime("%A"), prompt


@pytest.mark.parametrize("name", SOLVERS)
def test_lengths_follow_the_histogram(files, name):
    histogram = load_length_histogram(DEMO_DATASETS[name].lengths)
    lengths = lengths_tokens(files[name])
    # Standard error of the mean of 2000 draws: at most 1.3% of the mean (sst2); three of them, and 1% for
    # examples that cannot be as short as their target.
    mean_tokens = np.average(histogram.lengths, weights=histogram.counts)
    assert lengths.mean() == pytest.approx(mean_tokens, rel=0.05)
    drawn_from = np.repeat(histogram.lengths, histogram.counts)
    for q in (25, 50, 75, 90):
        # A quantile of a draw is noisier than a mean; one token is the resolution of the short ones.
        expected = np.percentile(drawn_from, q, method="inverted_cdf")
        assert np.percentile(lengths, q) == pytest.approx(expected, rel=0.07, abs=1)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_example_is_longer_than_a_user_would_declare(files, name):
    declared = {"sst2": 64, "openbookqa": 128, "rte": 256}[DEMO_DATASETS[name].lengths]
    assert DEMO_DATASETS[name].max_tokens == declared
    assert lengths_tokens(files[name]).max() <= declared


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (
        write_demo_texts(tmp_path / folder, examples_per_task=20, seed=seed)
        for folder, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    for name in DEMO_DATASETS:
        assert first[name].read_bytes() == again[name].read_bytes()
        assert first[name].read_bytes() != other[name].read_bytes()


def test_default_is_320_examples_per_task_in_a_folder_that_it_makes(tmp_path):
    paths = write_demo_texts(tmp_path / "new" / "folder")
    assert {len(read(path)) for path in paths.values()} == {320}
    assert all(path.parent == tmp_path / "new" / "folder" for path in paths.values())


def test_no_examples_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"^examples_per_task = 0: expected at least 1$"):
        write_demo_texts(tmp_path, examples_per_task=0)

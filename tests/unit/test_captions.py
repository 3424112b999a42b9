"""Records into sentences, sentences into captions."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from cosmos_fast.config import ViewsConfig
from cosmos_fast.data import faults, rng
from cosmos_fast.data.captions import draw_captions
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.records import DREAMLIP_FIELDS, MAX_RECORD_BYTES, parse_record


def sentences(raw: Any, schema: str = "auto") -> list[str]:
    return parse_record(json.dumps(raw).encode(), schema).sentences


def test_dreamlip_fields_are_joined_in_order() -> None:
    raw = {field: [f"{field} one", f"{field} two"] for field in reversed(DREAMLIP_FIELDS)}
    assert sentences(raw) == [f"{field} {n}" for field in DREAMLIP_FIELDS for n in ("one", "two")]


def test_string_instead_of_a_list_is_split_into_sentences_not_letters() -> None:
    raw = {
        "raw_caption": "Two dogs.",
        "longIB_captions": "A dog is 2.5 m away. It barks! Does it e.g. jump? Yes\nThe end.",
        "shortIB_captions": ["kept. whole"],
    }
    assert sentences(raw) == [
        "Two dogs",
        "kept. whole",
        "A dog is 2.5 m away",
        "It barks!",
        "Does it e.g. jump?",
        "Yes",
        "The end",
    ]


def test_blank_entries_and_other_types_in_a_list_are_dropped() -> None:
    assert sentences({"raw_caption": ["  a dog \n", "", "  ", None, 3, ["x"], "a cat"]}) == ["a dog", "a cat"]


def test_missing_fields_are_no_fault() -> None:
    assert sentences({"shortSV_captions": ["one"], "raw_caption": None, "scene": {"objects": []}}) == ["one"]


def test_pixelprose_is_split_on_newline_end_tag_and_full_stop() -> None:
    raw = {"original_caption": "orig. stays whole", "caption": "This image shows a cat.It sits</s> On a mat\nend. "}
    assert sentences(raw) == ["orig. stays whole", "This image shows a cat", "It sits", "On a mat", "end"]
    assert sentences({"caption": "only. this"}) == ["only", "this"]


def test_schema_can_be_forced() -> None:
    raw = {"raw_caption": ["dream"], "original_caption": "prose", "caption": "one. two"}
    assert sentences(raw) == ["dream"]
    assert sentences(raw, "pixelprose") == ["prose", "one", "two"]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", faults.EMPTY_MEMBER),
        (b"{", faults.BAD_JSON),
        (b"\xff\xfe\x00", faults.BAD_JSON),
        (b"[1, 2]", faults.BAD_JSON),
        (b'"text"', faults.BAD_JSON),
        (b"[" * 100_000, faults.BAD_JSON),
        (b'{"raw_caption": {"a": 1}}', faults.BAD_JSON),
        (b'{"raw_caption": 5}', faults.BAD_JSON),
        (b'{"caption": ["a"]}', faults.BAD_JSON),
        (b"{}", faults.NO_CAPTION),
        (b'{"raw_caption": []}', faults.NO_CAPTION),
        (b'{"raw_caption": ["", "  "]}', faults.NO_CAPTION),
        (b'{"original_caption": "", "caption": " . "}', faults.NO_CAPTION),
        (b'{"x": "' + b"y" * MAX_RECORD_BYTES + b'"}', faults.TOO_MANY_BYTES),
    ],
)
def test_unusable_records_are_faults_by_cause(data: bytes, cause: str) -> None:
    with pytest.raises(SampleFault) as fault:
        parse_record(data)
    assert fault.value.cause == cause


def numbers(item: int) -> np.random.Generator:
    return rng.generator(0, rng.CAPTIONS, item=item)


def test_globals_join_one_to_five_distinct_sentences_locals_are_single() -> None:
    views, source = ViewsConfig(), [f"s{i}" for i in range(12)]
    joined: Counter[int] = Counter()
    picked: Counter[str] = Counter()
    for item in range(3000):
        captions = draw_captions(source, views, numbers(item))
        assert len(captions) == 8
        for caption in captions[:2]:
            parts = caption.split(". ")
            assert len(set(parts)) == len(parts)
            assert set(parts) <= set(source)
            joined[len(parts)] += 1
        assert len(set(captions[2:])) == 6
        assert set(captions[2:]) <= set(source)
        picked.update(captions[2:])
    assert set(joined) == {1, 2, 3, 4, 5}
    assert all(abs(count - 1200) < 4 * np.sqrt(6000 * 0.2 * 0.8) for count in joined.values())
    assert all(abs(picked[s] - 1500) < 4 * np.sqrt(3000 * 0.5 * 0.5) for s in source)


def test_too_few_sentences_repeat_the_list_then_sample_the_rest() -> None:
    source = ["a", "b", "c", "d"]
    rests = Counter()
    for item in range(600):
        local = draw_captions(source, ViewsConfig(), numbers(item))[2:]
        assert local[:4] == source
        assert len(set(local[4:])) == 2
        rests.update(local[4:])
    assert all(abs(rests[s] - 300) < 4 * np.sqrt(600 * 0.25) for s in source)
    assert draw_captions(["only"], ViewsConfig(max_sentences=1), numbers(0)) == ["only"] * 8
    long = [
        caption.split(". ") for item in range(50) for caption in draw_captions(["x", "y"], ViewsConfig(), numbers(item))
    ]
    assert all(abs(parts.count("x") - parts.count("y")) <= 1 for parts in long)
    assert max(map(len, long)) == 5


def test_as_many_as_there_are_come_in_a_drawn_order() -> None:
    """No sentence keeps to one view: six sentences for six local captions, five for a global one of five."""
    source = list("abcdef")
    firsts = Counter(draw_captions(source, ViewsConfig(), numbers(item))[2] for item in range(600))
    assert set(firsts) == set(source)
    assert max(firsts.values()) < 150
    drawn = [draw_captions(list("abcde"), ViewsConfig(), numbers(item)) for item in range(300)]
    whole = {caption for captions in drawn for caption in captions[:2] if len(caption.split(". ")) == 5}
    assert len(whole) > 50


def test_captions_depend_on_the_generator_alone() -> None:
    source = [f"s{i}" for i in range(12)]
    first = [draw_captions(source, ViewsConfig(), numbers(item)) for item in range(20)]
    assert first == [draw_captions(source, ViewsConfig(), numbers(item)) for item in range(20)]
    assert len({tuple(captions) for captions in first}) == 20


@pytest.mark.parametrize(("global_captions", "local_captions"), [(1, 0), (2, 0), (1, 3)])
def test_counts_follow_the_configuration(global_captions: int, local_captions: int) -> None:
    views = ViewsConfig(global_captions=global_captions, local_captions=local_captions)
    assert len(draw_captions(["a", "b", "c"], views, numbers(1))) == global_captions + local_captions

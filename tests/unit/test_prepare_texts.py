"""Caption fields, whatever a tool made of them, as sentences; rows of tables; the store they are found in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.data.prepare import store as store_module
from cosmos_fast.data.prepare.layouts import DREAMLIP, PIXELPROSE, download_record
from cosmos_fast.data.prepare.shard import key_of
from cosmos_fast.data.prepare.store import build_store, is_built
from cosmos_fast.data.prepare.tables import BROKEN_ROW, TableReader, table_files
from cosmos_fast.data.prepare.texts import as_sentences, as_text
from cosmos_fast.data.records import parse_record
from cosmos_fast.utils.errors import UserError
from tests.downloads import (
    DREAMLIP_HEADER,
    PIXELPROSE_HEADER,
    dreamlip_row,
    dreamlip_sentences,
    pixelprose_row,
    url_of,
    write_csv,
    write_dreamlip,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("A cabin. It is 2.5 m high.", ["A cabin", "It is 2.5 m high"]),
        ("one</s>two\n\n three ...", ["one", "two", "three"]),
        ("Is it?  Yes!  e.g.  this", ["Is it?", "Yes!  e.g.  this"]),
        (["A cabin. It is old.", " ", None, 3, "two"], ["A cabin", "It is old", "two"]),
        ('["A cabin.", "It\'s old"]', ["A cabin", "It's old"]),
        ("['A cabin.', \"It's old\"]", ["A cabin", "It's old"]),
        ("[UNK] a cabin]", ["[UNK] a cabin]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['a' + open('x').read()]", ["['a' + open('x').read()]"]),
        ("[" * 5000 + "]" * 5000, ["[" * 5000 + "]" * 5000]),
        (list("A cabin. It is old."), ["A cabin", "It is old"]),
        (str(list("A cabin.")), ["A cabin"]),
        (["a", "b"], ["a", "b"]),
        (None, []),
        (math.nan, []),
        ({"a": "b"}, []),
        ("", []),
        (" . ", []),
    ],
)
def test_sentences_of_a_field(value: Any, expected: list[str]) -> None:
    assert as_sentences(value) == expected


def test_text_of_a_field() -> None:
    assert as_text("  One. Two. ") == "One. Two."
    assert as_text(["One.", "Two"]) == as_text('["One.", "Two"]') == "One. Two"
    assert as_text(list("One. Two.")) == "One. Two"
    assert as_text(None) == as_text(math.nan) == ""


def test_dreamlip_row_becomes_lists_that_the_loader_reads_in_its_order() -> None:
    record = DREAMLIP.record(dreamlip_row(7))
    assert record == dreamlip_sentences(7)
    read = parse_record(json.dumps(record).encode()).sentences
    assert read[0] == "a cabin in the woods , number 7"
    assert len(read) == 11
    assert DREAMLIP.record({"Image Path": "x", "raw_caption": "", "longIB_captions": None}) is None


def test_pixelprose_row_keeps_its_texts() -> None:
    record = PIXELPROSE.record(pixelprose_row(3))
    assert record == {
        "original_caption": "Cabin no. 3",
        "caption": "This image displays: a cabin, number 3. It has a green roof.\nThe style is a photo.",
        "uid": f"{3:032x}",
    }
    sentences = parse_record(json.dumps(record).encode()).sentences
    assert sentences == [
        "Cabin no. 3",
        "This image displays: a cabin, number 3",
        "It has a green roof",
        "The style is a photo",
    ]
    assert PIXELPROSE.record({**pixelprose_row(3), "vlm_caption": None}) is None
    assert "original_caption" not in (PIXELPROSE.record({**pixelprose_row(3), "original_caption": None}) or {})


@pytest.mark.parametrize(
    ("metadata", "text", "expected"),
    [
        ({"longSV_captions": "One. Two.", "caption": "x"}, "x", {"longSV_captions": ["One", "Two"]}),
        ({"longSV_captions": None, "caption": "One. Two."}, "x", {"raw_caption": ["One", "Two"]}),
        ({"vlm_caption": "One. Two.", "uid": "u"}, "", {"caption": "One. Two.", "uid": "u"}),
        ({"original_caption": "o", "caption": "c"}, "", {"original_caption": "o", "caption": "c"}),
        ({"original_caption": "o", "vlm_caption": None}, "t", {"original_caption": "o", "caption": "t"}),
        ({"caption": None}, "One. Two.", {"raw_caption": ["One", "Two"]}),
        ({}, " ", None),
        ({"caption": math.nan}, "", None),
    ],
)
def test_record_of_a_download(metadata: dict[str, Any], text: str, expected: dict[str, Any] | None) -> None:
    assert download_record(metadata, text) == expected


def test_csv_rows_with_everything_that_was_seen_in_one(tmp_path: Path) -> None:
    table = write_dreamlip(tmp_path / "cc3m.csv", range(3))
    text = table.read_text()
    header, rest = text.split("\n", 1)
    broken = "only,three,cells\n\n,no url,a,b,c,d,e,f\n"
    table.write_bytes(("\ufeff" + header + "\n" + broken + rest).encode() + b"caf\xe9,raw \xe9,a,b,c,d,e,f\n")
    reader = TableReader([table], DREAMLIP)
    passed: list[int] = []
    rows = list(reader.rows(passed.append))
    assert [name for name, _ in rows] == [url_of(0), url_of(1), url_of(2), "caf\ufffd"]
    assert rows[1][1] == dreamlip_row(1)
    assert reader.problems == {BROKEN_ROW: 1, "no Image Path": 1}
    assert sum(passed) == table.stat().st_size


def test_a_quote_that_is_never_closed_costs_what_it_swallows_not_the_rest(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "a.csv", DREAMLIP_HEADER, [dreamlip_row(0)])
    with table.open("a") as file:
        file.write('http://a/b.jpg,"never closed' + "x" * (2 << 20) + "\n")
        file.write(",".join(f"last{column}" for column in range(8)) + "\n")
    reader = TableReader([table], DREAMLIP)
    assert [name for name, _ in reader.rows()] == [url_of(0), "last0"]
    assert reader.problems[BROKEN_ROW] == 1


def test_a_quote_open_at_the_end_of_the_file_makes_no_caption_of_the_rows_behind_it(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "a.csv", DREAMLIP_HEADER, [dreamlip_row(0)])
    whole = table.read_bytes()
    with table.open("a") as file:
        file.write('http://a/b.jpg,a,b,c,d,e,f,"never closed\n')
        file.write("http://a/c.jpg,a,b,c,d,e,f,g\n")
    reader = TableReader([table], DREAMLIP)
    assert [name for name, _ in reader.rows()] == [url_of(0)]
    assert reader.problems == {BROKEN_ROW: 1}
    table.write_bytes(whole.rstrip())  # no line end is no open quote
    reader = TableReader([table], DREAMLIP)
    assert [row for _, row in reader.rows()] == [dreamlip_row(0)]
    assert not reader.problems


def test_parquet_gives_the_rows_that_csv_gives(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [pixelprose_row(number) for number in range(2500)]
    rows[1]["vlm_caption"] = None
    rows[2]["url"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1000)
    csv = write_csv(tmp_path / "b.csv", PIXELPROSE_HEADER, rows)
    both = [TableReader([path], PIXELPROSE) for path in (tmp_path / "a.parquet", csv)]
    passed: list[int] = []
    a, b = ([(name, PIXELPROSE.record(row)) for name, row in reader.rows(passed.append)] for reader in both)
    assert a == b
    assert len(a) == 2499
    assert a[1][1] is None
    assert both[0].problems == both[1].problems == {"no url": 1}
    assert sum(passed) == (tmp_path / "a.parquet").stat().st_size + csv.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"", "no table of dreamlip: it needs a column 'Image Path'"),
        ("a.csv", b"Image Path,caption\nx,y\n", "it needs a column one of 'raw_caption'"),
        ("a.csv", b"url2,raw_caption\nx,y\n", "it needs a column 'Image Path' and has url2, raw_caption"),
        ("a.csv", b"\x00\x01\x02", "no table of dreamlip|cannot read"),
        ("a.parquet", b"PAR1 and no more", "no whole parquet file|read by pyarrow"),
        ("a.json", b"{}", "caption tables are .csv, .tsv, .parquet files"),
        ("a.csv.gz", b"", "decompress or convert"),
    ],
)
def test_a_file_that_is_no_table_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        TableReader(table_files([str(path)]), DREAMLIP).check()
    assert "\n" not in str(error.value)


def test_tables_are_files_globs_or_directories(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "notes.md", "c.tsv"):
        (tmp_path / name).write_text("x")
    a, b, c = (tmp_path / name for name in ("a.csv", "b.csv", "c.tsv"))
    assert table_files([str(tmp_path)]) == [a, b, c]
    assert table_files([str(tmp_path / "*.csv"), str(c)]) == [a, b, c]
    for wrong, told in ((tmp_path / "none.csv", "is not there"), (tmp_path / "*.parquet", "is not there")):
        with pytest.raises(UserError, match=told):
            table_files([str(wrong)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no caption table"):
        table_files([str(tmp_path / "empty")])


def test_store_finds_every_name_and_of_repeated_ones_the_first(tmp_path: Path) -> None:
    pairs = [(f"näme {number % 900}", {"raw_caption": [str(number)]}) for number in range(1000)]
    store, repeated = build_store(tmp_path, pairs, {"a": 1})
    assert repeated == 100
    assert all(json.loads(store.find(f"näme {number}") or b"") == pairs[number][1] for number in range(900))
    assert store.find("other") is None
    assert store.example() == "näme 0"
    assert is_built(tmp_path, {"a": 1})
    assert not is_built(tmp_path, {"a": 2})
    store.close()
    assert store.find("näme 1") is not None


def test_names_of_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_hash", lambda name: len(name))
    store, _ = build_store(tmp_path, [(name, {"raw_caption": [name]}) for name in ("aa", "b", "bb", "cc")], {})
    assert [json.loads(store.find(name) or b"null") for name in ("bb", "cc", "aa", "dd", "ddd")] == [
        *({"raw_caption": [name]} for name in ("bb", "cc", "aa")),
        None,
        None,
    ]


def test_a_store_without_rows_finds_nothing(tmp_path: Path) -> None:
    store, repeated = build_store(tmp_path, [], {})
    assert (store.find("a"), store.example(), repeated) == (None, None, 0)


def test_a_build_that_was_cut_short_is_no_store(tmp_path: Path) -> None:
    build_store(tmp_path, [("a", {"raw_caption": ["a"]})], {})

    def cut_short() -> Any:
        yield "b", {"raw_caption": ["b"]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path, cut_short(), {})
    assert not is_built(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "key"), [("0000000/0000008.jpg", "0000008"), ("a/b", "b"), ("x.PNG", "x"), (" no.5 ", "no.5")]
)
def test_key_of_a_name(name: str, key: str) -> None:
    assert key_of(name) == key

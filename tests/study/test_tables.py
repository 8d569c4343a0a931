"""Tables give their numbers and labels back, and each mistake is found in its line and column."""

import numpy as np
import pytest
from study.loading import assert_refused, assert_sound, assert_survives_damage

from batchnorm.study.data import load

PLAIN = "a,b,label\n" + "".join(f"{i},{i / 4},{i % 3}\n" for i in range(30))


def write(folder, content, encoding="utf-8"):
    (folder / "t.csv").write_bytes(content.encode(encoding))
    return f"csv:{folder / 't.csv'}"


def rows_of(data):
    """The lines of the table again, the label last, sorted."""
    train_x, train_y, test_x, test_y = assert_sound(data)
    inputs = np.concatenate([train_x, test_x])
    inputs = inputs.reshape(len(inputs), -1).astype(float)
    rows = np.column_stack([inputs, np.concatenate([train_y, test_y])])
    return sorted(map(tuple, rows.tolist()))


EXPECTED = [(i, i / 4, i % 3) for i in range(30)]


def test_values_and_split(tmp_path):
    data = load(write(tmp_path, PLAIN))
    assert (data.name, data.shape, data.classes) == ("t", (2, 1, 1), 3)
    assert rows_of(data) == EXPECTED
    assert np.bincount(data.test_labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("mark", [",", ";", "\t", ", ", " ; "])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\n  \n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_ways_a_table_is_written(tmp_path, mark, end, encoding):
    content = PLAIN.replace(",", mark).replace("\n", end)
    assert rows_of(load(write(tmp_path, content, encoding))) == EXPECTED
    assert rows_of(load(write(tmp_path, end + content.rstrip(), encoding))) == EXPECTED


@pytest.mark.parametrize(
    ("header", "order"),
    [
        ("a,b,c", [0, 1, 2]),
        ("", [0, 1, 2]),
        ("label,a,b", [2, 0, 1]),
        ('"a, too","Class",b', [0, 2, 1]),
        ("y,a,b", [2, 0, 1]),
        ("TARGET,y,b", [2, 0, 1]),  # points in a plane may be x and y
        ("a,label,target", [0, 2, 1]),
        ("0,1,label", [0, 1, 2]),  # as pandas calls the columns of an array
        ("label,0,1", [2, 0, 1]),
        ("größe,重さ,label", [0, 1, 2]),
    ],
)
def test_the_label_column(tmp_path, header, order):
    rows = ([i, i / 4, i % 3] for i in range(30))
    lines = (",".join(str(row[column]) for column in order) for row in rows)
    content = "\n".join([*([header] if header else []), *lines])
    assert rows_of(load(write(tmp_path, content))) == EXPECTED


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["3", "1", "2"], [3, 1, 2]),
        (["10", "9", "01"], [10, 9, 1]),
        (["cat", "ant", "bee"], [2, 0, 1]),
        (["Cat", "ant", "a;b"], [0, 2, 1]),
        (["yes", "no", "y"], [2, 0, 1]),
        (["-1", "0", "1"], [0, 1, 2]),  # text, as all that is not a whole number from 0
        (["0.0", "1.0", "2.0"], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("header", ["", "a,label\n"])
def test_labels(tmp_path, labels, numbers, header):
    content = header + "".join(f"{i},{labels[i % 3]}\n" for i in range(30))
    expected = [(i, numbers[i % 3]) for i in range(30)]
    assert rows_of(load(write(tmp_path, content))) == expected


LINES = PLAIN.splitlines()


def with_line(number, line):
    """The table with another line."""
    return "\n".join([*LINES[: number - 1], line, *LINES[number:]])


WRONG = [
    ("", "t.csv: got 0 columns, expected two or more"),
    ("\n \n", "t.csv: got 0 columns"),
    ("a\n1\n2\n", "t.csv: got 1 columns"),
    ("a b label\n1 2 0\n", "t.csv: got 1 columns"),
    ("a,b,label\n", "t.csv: got a header alone"),
    (with_line(5, "1,2"), "t.csv, line 5: got 2 cells, expected 3, as in line 1"),
    (with_line(5, "1,2,0,"), "t.csv, line 5: got 4 cells, expected 3"),
    ("\n\n" + with_line(5, "1,2"), "t.csv, line 7: got 2 cells, expected 3, as in line 3"),
    (with_line(9, "1,x,0"), "t.csv, line 9, column 2 (b): got 'x', expected a number"),
    (with_line(9, "1,,0"), "t.csv, line 9, column 2 (b): got no value, expected a number"),
    (with_line(9, " ,1,0"), "t.csv, line 9, column 1 (a): got no value, expected a number"),
    (with_line(9, "1,2,"), "t.csv, line 9, column 3 (label): got no value, expected a label"),
    (with_line(9, "1,2,NaN"), "t.csv, line 9, column 3 (label): got no value, expected a label"),
    (with_line(9, "NaN,2,0"), "t.csv, line 9, column 1 (a): got nan, expected a finite"),
    (with_line(9, "1,-inf,0"), "t.csv, line 9, column 2 (b): got -inf, expected a finite"),
    (with_line(9, "1,1e300,0"), "t.csv, line 9, column 2 (b): got 1e+300, expected a finite"),
    ("\n".join(LINES[1:9]) + "\n1,x,0", "t.csv, line 9, column 2: got 'x', expected a number"),
    ("label,a\n0,1\n1,nan\n", "t.csv, line 3, column 2 (a): got nan"),
    (with_line(9, '1,"2,0'), "unexpected end of data, line"),
    (with_line(9, '1,"2"3,0'), "expected after '\"', line 9"),
    (with_line(9, f"1,{'2' * 200_000},0"), "field larger than field limit (131072), line 9"),
    (f"{'a' * 200_000},b,label\n1,2,0", "field larger than field limit (131072)"),
    (with_line(9, "1,2\0,0"), r"'2\x00'"),
    (with_line(9, "1;5,2,0"), "line 9, column 1 (a): got '1;5'"),
    (with_line(1, ",b,label"), "t.csv, line 1, column 1: got a column without a name"),
    (with_line(1, "a,label,label"), "t.csv, line 1: got 2 columns 'label'"),
    (with_line(9, "1,2,7.5"), "one example with the label 7.5"),
    (with_line(9, "1,2,70"), "one example with the label 70"),
    ("a,b\n" + "1,x\n" * 10, "one class only, x, to train on"),
    ("a,b\n" + "1,700\n2,3\n" * 10, "the label 700 among"),
]


@pytest.mark.parametrize(("content", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_tables(tmp_path, content, words):
    assert_refused(write(tmp_path, content), words)


def test_other_encodings_are_refused(tmp_path):
    assert_refused(write(tmp_path, PLAIN, "utf-16"), tmp_path / "t.csv", "'utf-8' codec")
    assert_refused(write(tmp_path, "größe" + PLAIN, "latin-1"), tmp_path / "t.csv", "'utf-8' codec")


def test_a_damaged_table_loads_or_raises_data_error(tmp_path):
    assert_survives_damage(write(tmp_path, PLAIN), tmp_path / "t.csv")

"""Files written whole or not at all."""

import os
import stat
import threading

import pytest

from lit_compress.files import replacing, write_text


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "new" / "deep" / "x.json"
    assert write_text(str(file), "{ü}") == file
    assert file.read_bytes() == "{ü}".encode()
    assert os.listdir(file.parent) == ["x.json"]


def write_half(file, error):
    with replacing(file) as part:
        part.write_text("half of the n")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_older_file(error, tmp_path):
    file = tmp_path / "x.bin"
    file.write_text("old")
    with pytest.raises(error):
        write_half(file, error)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_block_that_writes_nothing_is_told(tmp_path):
    file = tmp_path / "x.bin"
    file.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(file):
        pass
    assert file.read_text() == "old"


def test_the_file_has_its_name_already_which_writers_look_at(tmp_path):
    with replacing(tmp_path / "model.onnx") as part:
        assert part.name == "model.onnx"
        assert part.parent.parent == tmp_path
        assert not part.exists()
        part.touch()
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        file = write_text(tmp_path / "shared.json", "{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_two_at_a_time_do_not_mix(tmp_path):
    file = tmp_path / "x.txt"
    texts = [letter * 100_000 for letter in "abcdefgh"]
    threads = [threading.Thread(target=write_text, args=(file, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in texts
    assert os.listdir(tmp_path) == ["x.txt"]


def write_pair(path, content):
    path.write_text(content)
    path.with_suffix(".bin").write_text(content)


def read_all(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_companions_take_their_places_together(tmp_path):
    for content in ("first", "second"):
        with replacing(tmp_path / "net.xml", ".bin") as part:
            write_pair(part, content)
        assert read_all(tmp_path) == {"net.xml": content, "net.bin": content}


@pytest.mark.parametrize("missing", [".xml", ".bin"])
@pytest.mark.parametrize("older", [True, False])
def test_where_one_of_a_pair_is_missing_nothing_changes(missing, older, tmp_path):
    if older:
        write_pair(tmp_path / "net.xml", "older")
    before = read_all(tmp_path)

    def write_one():
        with replacing(tmp_path / "net.xml", ".bin") as part:
            write_pair(part, "new")
            part.with_suffix(missing).unlink()

    with pytest.raises(FileNotFoundError):
        write_one()
    assert read_all(tmp_path) == before

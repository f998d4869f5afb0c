"""Laws of JSON files that vouch for themselves: what was written comes back, and nothing else does."""

import json

import pytest
from reference import refused

from diffusion import sealed
from diffusion.errors import InputError

RECORD = {"rows": [{"metrics": {"fid": 12.375, "is": float("nan")}, "steps": (5, 10)}], "name": "é"}
AS_READ = {"rows": [{"metrics": {"fid": 12.375, "is": None}, "steps": [5, 10]}], "name": "é"}


@pytest.fixture
def path(tmp_path):
    sealed.write(tmp_path / "a.json", RECORD)
    return tmp_path / "a.json"


def test_a_record_comes_back_as_json_holds_it(path):
    assert sealed.read(path) == AS_READ


def test_a_flipped_bit_is_found_or_changes_nothing(path):
    """Only in what stands around the values, or in the name of the seal itself, may a bit be another one."""
    content = path.read_bytes()
    seal = content.index(b'"sha256"')
    found = 0
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                assert sealed.read(path) == AS_READ or seal < place < seal + 7
            except InputError:
                found += 1
    assert found > 0.9 * 8 * len(content)


def test_a_number_that_was_changed_by_hand_is_refused(path):
    path.write_text(path.read_text().replace("12.375", "2.375"))
    with refused("it is not what was written"):
        sealed.read(path)


def test_a_file_of_an_earlier_version_has_no_seal_and_is_read(path):
    path.write_text(json.dumps(AS_READ))
    assert sealed.read(path) == AS_READ


@pytest.mark.parametrize("text", ["[]", "3", "null", '"sha256"'])
def test_what_is_no_object_is_refused(path, text):
    path.write_text(text)
    with refused("is damaged"):
        sealed.read(path)

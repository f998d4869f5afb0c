"""Laws of files that come from strangers: each ends in one line, with little memory and nothing written or run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import strangers

GIB = 2**30


def read_all(folder, every):
    """Builds and reads each `every`-th file in a process of its own; returns what became of them."""
    script = Path(strangers.__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), str(folder / "files"), str(every)]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [path.name for path in folder.iterdir()] == ["files"]  # a call would have made `hacked`
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(rows):
    bad = [row for row in rows if not row["ended"].startswith("refused: ") or row["left"]]
    assert bad == []
    assert max(row["peak"] for row in rows) < GIB
    assert max(row["seconds"] for row in rows) < 60


def test_files_of_strangers_end_in_one_line_and_at_most_one_gib(tmp_path):
    rows = read_all(tmp_path, every=12)
    assert {row["kind"] for row in rows} == set(strangers.KINDS)
    check(rows)


@pytest.mark.reliability
def test_all_files_of_strangers_end_in_one_line_and_at_most_one_gib(tmp_path, capsys):
    rows = read_all(tmp_path, every=1)
    check(rows)
    with capsys.disabled():
        peak = max(row["peak"] for row in rows) / 2**20
        print(f"\n  {len(rows)} files of strangers: 0 tracebacks, 0 writes elsewhere, {peak:.0f} MiB at most")


def test_good_files_of_each_kind_are_read(tmp_path):
    """So that what refuses the damaged ones is the damage."""
    good = {
        "weights.safetensors": strangers.model_file(lambda facts: None),
        "classifier.safetensors": strangers.classifier_file(),
        "table.json": strangers.table_with(),
        "results": strangers.below("evaluation.json", strangers.content(json.dumps({"rows": [strangers.ROW]}))),
        "samples": strangers.job,
    }
    for kind, build in good.items():
        build(tmp_path / kind)
        strangers.KINDS[kind][0](tmp_path / kind)
    strangers.torch_zip(strangers.state(strangers.torch_tensor()), strangers.NUMBERS)(tmp_path / "a.pth")
    found = strangers.torch_file.read_state_dict(tmp_path / "a.pth")
    assert (list(found), found["a"].shape) == (["a"], (4,))

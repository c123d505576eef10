"""The torture in seconds: a few kills, and some hundred damaged files."""
import json
import subprocess
import sys

import pytest

from benchmarks.torture_files import mutate
from tests.engine.tiny import REPO


@pytest.mark.slow
def test_a_few_kills_and_damaged_files(tmp_path):
    command = [
        sys.executable, '-m', 'benchmarks.torture', '--scale', '0.02',
        '--kinds', 'files', 'kills', '--work-dir',
        str(tmp_path / 'torture')
    ]
    process = subprocess.run(
        command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    assert 'packed file' in process.stdout
    found = json.loads((tmp_path / 'torture/notes.json').read_text())
    for counts in found['files'].values():
        assert counts['refused'] > 10
        assert counts['other'] == counts['crashed'] == 0
    assert [sum(counts.values())
            for counts in found['files'].values()] == [200, 20]
    kills = [counts for counts in found['kills'].values() if counts['kills']]
    assert sum(counts['kills'] for counts in kills) == 2
    for counts in kills:
        assert counts['same'] == counts['runs'] > 0
        assert counts['failed'] == 0


def test_damage_can_be_made_again():
    import random
    content = bytes(range(256)) * 9
    for seed in range(50):
        first, second = (
            mutate(content, content[::-1], random.Random(seed))
            for _ in range(2))
        assert first == second

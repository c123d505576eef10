"""The README's Python runs as it stands, and its links lead somewhere."""
import doctest
import re

import cv2
import pytest

from isvit_det.datasets.drawing import draw_picture
from tests.engine.tiny import REPO

README = REPO / 'README.md'


class Checker(doctest.OutputChecker):
    """Progress is not compared: only output that the text shows."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for number in range(3):
        picture = draw_picture((7, number)).pixels
        cv2.imwrite(str(photos / f'{number}.jpg'), picture)
    (tmp_path / 'configs').symlink_to(REPO / 'configs')
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(README.read_text(), {},
                                               'README', str(README), 0)
    assert len(test.examples) > 5
    assert doctest.DocTestRunner(Checker()).run(test).failed == 0


def test_links_lead_to_files():
    links = re.findall(r'\]\(([^)#]+)\)', README.read_text())
    local = [link for link in links if '://' not in link]
    assert len(local) > 40
    for link in local:
        assert (REPO / link).exists(), link


@pytest.mark.parametrize('folder', ['isvit', 'vit', 'swin'])
def test_every_config_of_the_zoo_is_linked(folder):
    text = README.read_text()
    for path in (REPO / 'configs' / folder).glob('*.py'):
        assert f'](configs/{folder}/{path.name})' in text

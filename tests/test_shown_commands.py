"""Commands that the pages show: they run as shown, or say what they need."""
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import List, NamedTuple

import cv2
import mmdet
import pytest
import timm
import torch

from isvit_det.__main__ import COMMANDS
from isvit_det.commands import parsers
from isvit_det.datasets.drawing import draw_picture
from tests.engine.tiny import REPO, make_tiny
from tests.test_readme import DOCS, README

PAGES = [README, *DOCS, REPO / 'CONTRIBUTING.md']
BLOCK = re.compile(r'(?:^ {4}.*\n)+', re.MULTILINE)
PROGRAMS = ('make', 'python', 'pip', 'isvit_det', 'torchrun', 'srun', 'mim')
COMMAND = re.compile(rf'(?:\w+=\S+ )*(?:{"|".join(PROGRAMS)}) .*')
NEEDS = re.compile(r'^(?:needs|takes) .*|(?<= )needs .*')
MMDET = Path(mmdet.__path__[0]) / '.mim'
# What stands for the words that the reader is to replace.
STAND_INS = {
    'MMDET': str(MMDET),
    'FOLDER': 'my_config_w4a4_detector',
    'WORK_DIR': 'work_dirs/my_config_w4a4_detector',
    'PACKED': 'work_dirs/my_config_w4a4_detector/packed.pth',
    r'FLOAT_CONFIG|CONFIG(?:\.py)?': 'my_config.py',
    'CHECKPOINT': 'my_checkpoint.pth',
    'MODEL': 'deit_tiny_patch16_224',
    'FILE': 'weights.pth',
    '(?:TRAIN_)?DIR': 'photos',
    'VAL_DIR': 'other_photos'
}
# So that a calibration takes seconds.
SMALL = ['--calib-images', '2', '--iters', '1']
NUM_PHOTOS = 3


class Shown(NamedTuple):
    """A command in a block of a page.

    ``needs`` is what it needs or how long it takes, by the comment behind it
    or by the words that follow the block.
    """
    page: str
    command: str
    needs: str

    @property
    def words(self) -> List[str]:
        """Its words, without variables of the environment."""
        words = shlex.split(self.command.replace('[', '').replace(']', ''))
        return [word for word in words if not re.match(r'[A-Z_]+=', word)]

    @property
    def tool(self) -> str:
        """The name of our command that it starts, if it does."""
        name = re.search(r'(?:^|[ /])(?:isvit_det |tools/)(\w+)', self.command)
        known = name and name[1] in COMMANDS and 'MMDET/' not in self.command
        return name[1] if known else ''

    @property
    def arguments(self) -> List[str]:
        """What our command is given."""
        names = (self.tool, f'tools/{self.tool}.py')
        start, = (place for place, word in enumerate(self.words)
                  if word in names)
        return self.words[start + 1:]


def shown(path: Path) -> List[Shown]:
    """Commands in the indented blocks of a page."""
    text = path.read_text()
    found = []
    for block in BLOCK.finditer(text):
        after = text[block.end():].lstrip()
        lines = re.sub(r' *\\\n +', ' ', block[0]).splitlines()
        for line in lines:
            command, _, comment = line.strip().partition('  # ')
            if COMMAND.fullmatch(command.strip()):
                needs = ''.join(NEEDS.findall(comment or after.split('\n')[0]))
                found.append(Shown(path.stem, command.strip(), needs))
    return found


ALL = [command for path in PAGES for command in shown(path)]
WITHOUT_NEEDS = [command for command in ALL if not command.needs]


def test_all_kinds_of_commands_are_seen():
    tools = {command.tool for command in ALL}
    assert {'quantize_det', 'quantize_cls', 'benchmark_det'} < tools
    assert any(command.command.startswith('make ') for command in ALL)
    assert any(command.page == 'CONTRIBUTING' for command in ALL)


@pytest.mark.parametrize(
    'command', [command for command in ALL if command.tool],
    ids=lambda command: f'{command.page}: {command.command}')
def test_options_that_are_shown_exist(command):
    getattr(parsers, command.tool)().parse_args(command.arguments)


def test_a_command_that_no_test_runs_says_what_it_needs():
    silent = [
        command for command in WITHOUT_NEEDS
        if not command.tool and 'MMDET/tools/test.py' not in command.command
    ]
    assert silent == []


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A user's folder: what the stand-ins name."""
    folder = tmp_path_factory.mktemp('user')
    tiny = make_tiny(folder)
    for name, path in (('my_config.py', tiny.config), ('my_checkpoint.pth',
                                                       tiny.checkpoint),
                       ('tools', REPO / 'tools')):
        (folder / name).symlink_to(path)
    model = timm.create_model(STAND_INS['MODEL'])
    torch.save(model.state_dict(), folder / STAND_INS['FILE'])
    for seed, name in enumerate(('photos', 'other_photos')):
        (folder / name).mkdir()
        for number in range(NUM_PHOTOS):
            picture = draw_picture((seed, number)).pixels
            cv2.imwrite(str(folder / name / f'{number}.jpg'), picture)
    return folder


def filled(word: str) -> str:
    """A word of a command, with stand-ins for what is to be replaced."""
    for name, stand_in in STAND_INS.items():
        word = re.sub(rf'(?<![A-Za-z_])(?:{name})(?![A-Za-z_])', stand_in,
                      word)
    return word


@pytest.mark.slow
def test_commands_run_as_they_are_shown(folder):
    # In the order of the pages: the first ones make the packed file that
    # others read.
    failed = {}
    for command in WITHOUT_NEEDS:
        argv = [filled(word) for word in command.words]
        if command.tool in ('quantize_det', 'quantize_cls'):
            argv += SMALL
        if argv[0] == 'python':
            argv[0] = sys.executable
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            failed[command.command] = done.stderr
    assert not failed

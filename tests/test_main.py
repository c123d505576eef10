"""python -m isvit_det and the scripts in tools/: the commands are there."""
import subprocess
import sys

import pytest

from isvit_det.__main__ import COMMANDS, main
from tests.engine.tiny import REPO

# Seconds to import.
HEAVY = {'torch', 'mmcv', 'mmdet', 'timm', 'pycocotools'}
HELP = '''
import sys
from isvit_det.__main__ import COMMANDS, main
for name in COMMANDS:
    try:
        main([name, '--help'])
    except SystemExit as end:
        assert end.code == 0, name
print('imported:', *{*sys.modules} & {*sys.argv[1:]})
'''


def test_every_command_has_a_script_and_is_listed(capsys):
    assert main(['--help']) == 0
    out = capsys.readouterr().out
    assert {path.stem for path in (REPO / 'tools').glob('*.py')} == {*COMMANDS}
    for name in COMMANDS:
        assert f'  {name} ' in out


def test_help_waits_for_no_package():
    done = subprocess.run([sys.executable, '-c', HELP, *HEAVY],
                          capture_output=True,
                          text=True,
                          check=True)
    *shown, last = done.stdout.splitlines()
    assert sum(line.startswith('usage: ') for line in shown) == len(COMMANDS)
    assert last.split() == ['imported:']


WRONG = '''
import sys
from isvit_det.__main__ import main
try:
    main(['quantize_det', 'CONFIG', '--iters', 'many'])
except SystemExit as end:
    assert end.code == 2
print('imported:', *{*sys.modules} & {*sys.argv[1:]})
'''


def test_a_wrong_option_waits_for_no_package():
    done = subprocess.run([sys.executable, '-c', WRONG, *HEAVY],
                          capture_output=True,
                          text=True,
                          check=True)
    assert done.stdout.split() == ['imported:']
    line, = done.stderr.splitlines()
    assert line.startswith(
        "error: argument --iters: invalid int value: 'many'")
    assert '--help' in line


@pytest.mark.parametrize('argv, option', [
    (['quantize_det', 'CONFIG', '--work-dir', ''], '--work-dir'),
    (['quantize_cls', 'MODEL', '--weights', ''], '--weights'),
    (['quantize_cls', 'MODEL', '--weights', 'x', '--calib', ''], '--calib'),
    (['quantize_cls', 'MODEL', '--weights', 'x', '--val', ''], '--val'),
    (['quantize_cls', 'MODEL', '--weights', 'x', '--work-dir', ''
      ], '--work-dir'),
    (['publish_float', '', 'out.pth'], 'source'),
    (['publish_float', 'in.pth', ''], 'out'),
    (['convert_vitdet', 'in.pth', '', '--config', 'x.py'], 'out'),
    (['convert_swin_od', 'in.pth', 'out.pth', '--config', ''], '--config'),
    (['reproduce_table', '--work-dir', ''], '--work-dir'),
    (['reproduce_table', '--data-root', ''], '--data-root'),
    (['reproduce_table', '--metafile', ''], '--metafile'),
])
def test_an_empty_value_is_not_the_current_folder(argv, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument {option}: '' is empty; give ")


@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_refuses_an_unknown_option_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, '--no-such-option'])
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')


def test_a_script_runs_its_command_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable,
         str(REPO / 'tools/publish_float.py'), '--help'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True)
    assert done.stdout.startswith('usage: publish_float.py ')


def test_an_unknown_command_is_refused_in_one_line(capsys):
    assert main(['train']) == 2
    assert "'train' is not a command" in capsys.readouterr().err

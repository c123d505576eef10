"""python -m isvit_det: what it lists is there."""
import importlib

import pytest

from isvit_det.__main__ import COMMANDS, TOOLS, main
from tests.engine.tiny import REPO


def test_every_tool_is_listed(capsys):
    assert main(['--help']) == 0
    out = capsys.readouterr().out
    for path in (REPO / 'tools').glob('*.py'):
        assert f'  {path.stem} ' in out
    for name in (*COMMANDS, *TOOLS):
        assert (REPO / 'tools' / f'{name}.py').exists()


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_run(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, '--help'])
    assert stop.value.code == 0
    assert f'python -m isvit_det {name}' in capsys.readouterr().out
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


def test_an_unknown_command_is_refused_in_one_line(capsys):
    assert main(['train']) == 2
    assert "'train' is not a command" in capsys.readouterr().err

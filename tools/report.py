#!/usr/bin/env python
"""Make the report of a finished run again, or of several side by side."""
import importlib.util
import sys
from pathlib import Path

if __name__ == '__main__':
    if importlib.util.find_spec('isvit_det') is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from isvit_det.__main__ import run
    sys.exit(run('report', sys.argv[1:]))

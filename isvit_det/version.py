"""The package's version, alone so that ``setup.cfg`` can read it."""
__version__ = '0.1.0'

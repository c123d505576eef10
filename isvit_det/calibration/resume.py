"""Files that hold the finished units of a calibration, for resuming it."""
import pickle
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.units import Unit

FORMAT_VERSION = 1


class ProgressFiles:
    """One file for every finished unit, each written whole or not at all.

    Args:
        directory: of the files; made when needed.
        fingerprint: of the run. Files of another one are removed.

    Attributes:
        discarded: whether there were files of another fingerprint.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.fingerprint = f'{FORMAT_VERSION}:{fingerprint}'
        self.discarded = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            note = directory / 'fingerprint'
            old = note.read_text() if note.exists() else None
            if old != self.fingerprint:
                for path in directory.glob('*.pth'):
                    path.unlink()
                    self.discarded = True
                note.write_text(self.fingerprint)
        except OSError as error:
            raise QuantError(
                f'work directory: {directory} cannot be written '
                f'({error.strerror}); choose another one.') from error

    def _path(self, index: int) -> Path:
        return self.directory / f'{index:04d}.pth'

    def save(self, index: int, unit: Unit, record: Dict[str, Any]) -> None:
        """Write the state of a finished unit and its record.

        Raises:
            QuantError: if the disk is full; units saved before stay.
        """
        content = dict(
            name=unit.name, state=unit.module.state_dict(), record=record)
        write_atomically(
            self._path(index), lambda file: torch.save(content, file))

    def load(self, index: int, unit: Unit) -> Optional[Dict[str, Any]]:
        """Put a saved unit's state in place.

        Returns:
            Its record, or None if there is none that can be read.
        """
        try:
            saved = torch.load(
                self._path(index), map_location='cpu', weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None
        assert saved['name'] == unit.name
        unit.module.load_state_dict(saved['state'])
        return saved['record']

"""Files of the finished units of a calibration, to resume from."""
import hashlib
import io
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.units import Unit

FORMAT_VERSION = 2
# Bytes of the checksum at the start of a file.
CHECKSUM = 32


class ProgressFiles:
    """One file for each finished unit.

    Args:
        directory: of the files; created if needed.
        fingerprint: of the run. Files with another fingerprint are removed.

    Attributes:
        discarded: whether there were files with another fingerprint.
        damaged: whether the last ``load`` found a damaged file.

    Raises:
        QuantError: if the directory cannot be written.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.fingerprint = f'{FORMAT_VERSION}:{fingerprint}'
        self.discarded = False
        self.damaged = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            note = directory / 'fingerprint'
            old = note.read_bytes() if note.exists() else None
            if old != self.fingerprint.encode():
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
        content = io.BytesIO()
        torch.save(
            dict(state=unit.module.state_dict(), record=record), content)
        value = content.getvalue()
        write_atomically(
            self._path(index),
            lambda file: file.write(self._checksum(unit, value) + value))

    def load(self, index: int, unit: Unit) -> Optional[Dict[str, Any]]:
        """Load the saved state of a unit into its module.

        Returns:
            The record, or None if there is no file or it is damaged.
        """
        self.damaged = False
        try:
            content = self._path(index).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            content = b''
        # torch only reads what was saved, to the last bit.
        value = content[CHECKSUM:]
        if content[:CHECKSUM] != self._checksum(unit, value):
            self.damaged = True
            return None
        saved = torch.load(
            io.BytesIO(value), map_location='cpu', weights_only=True)
        unit.module.load_state_dict(saved['state'])
        return saved['record']

    def _checksum(self, unit: Unit, value: bytes) -> bytes:
        """Checksum of a file's content, of the unit's name and of the run."""
        origin = f'{self.fingerprint} {unit.name}\n'.encode()
        return hashlib.sha256(origin + value).digest()

"""The detectors of a metafile, and where their float weights come from."""
import os
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Sequence

import yaml
from mmengine.fileio import load

import isvit_det
from isvit_det.commands.cells import run_command_line
from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint, path_of

# A clone's own folder, or that of the installed package.
ROOT = (Path(isvit_det.__file__).parent / '.mim/configs').resolve().parent
METAFILE = ROOT / 'configs/isvit/metafile.yml'
PUBLISHED = 'Published (I&S-ViT) '


class Entry(NamedTuple):
    """What a metafile says of one detector at some bits.

    Attributes:
        config: of its quantization, a path.
        metrics: published and measured figures by name.
        float_config: path or name of the float config.
        address: of the float checkpoint; '' if there is none.
        converter: script that fits that checkpoint to the float config; ''
            if it fits as it is.
    """
    config: str
    metrics: Mapping[str, Any]
    float_config: str = ''
    address: str = ''
    converter: str = ''

    def published(self, prefix: str = '') -> str:
        """Published box and mask AP.

        Args:
            prefix: ``'float '`` for those of the float model.
        """
        keys = [f'{PUBLISHED}{prefix}{kind} AP' for kind in ('box', 'mask')]
        if not set(keys) <= set(self.metrics):
            return '-'
        return '/'.join(f'{self.metrics[key]:.1f}' for key in keys)


def read_column(path: Path, bits: str) -> Dict[str, Entry]:
    """What a metafile says of all detectors at some bits, by detector.

    Raises:
        QuantError: if it cannot be read or has no such bits.
    """
    if not path.is_file():
        raise QuantError(f'--metafile: there is no file {path}; give the path '
                         'of one, or leave it out.')
    column: Dict[str, Entry] = {}
    known = set()
    try:
        for model in load(str(path))['Models']:
            facts = model['Metadata']
            known.add(facts['Bits'])
            if facts['Bits'] != bits:
                continue
            metrics: Dict[str, Any] = {}
            for result in model['Results']:
                metrics.update(result['Metrics'])
            for key in metrics:
                if key.startswith(PUBLISHED):
                    metrics[key] = float(metrics[key])
            column[facts['Detector']] = Entry(
                os.path.relpath(ROOT / model['Config']), metrics,
                _config_name(facts.get('Float Config', '')),
                facts.get('Float Checkpoint', ''),
                facts.get('Float Converter', ''))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise QuantError(
            f'--metafile: {path} is not in the form of '
            f'configs/isvit/metafile.yml ({error}); give one that '
            'is, or leave it out.') from error
    if not column:
        raise QuantError(f'--bits: {bits!r} is not in {path}; expected one '
                         f'of {sorted(map(str, known))}.')
    return column


def find_sources(given: Sequence[str],
                 detectors: Sequence[str]) -> Dict[str, str]:
    """Files or addresses of float checkpoints, by detector.

    Args:
        given: ``DETECTOR=FILE`` or folders.
        detectors: that there are.

    Raises:
        QuantError: if something given is for none of them or is not there.
    """
    sources: Dict[str, str] = {}
    for text in given:
        if Path(text).is_dir():
            files = {one: Path(text) / f'{one}.pth' for one in detectors}
            present = {
                one: str(path)
                for one, path in files.items() if path.is_file()
            }
            if not present:
                raise QuantError(f'--checkpoints: no file in {text} is named '
                                 f'as a detector, such as {detectors[0]}.pth.')
            sources.update(present)
            continue
        detector, _, source = text.partition('=')
        if not source:
            raise QuantError(f'--checkpoints: {text!r} is no folder; give '
                             f'DETECTOR=FILE, such as {detectors[0]}=FILE.')
        check_detector('--checkpoints', detector, detectors)
        path = path_of(source)
        if path is not None and not path.is_file():
            raise QuantError(f'--checkpoints: there is no file {source}, '
                             f'given for {detector}.')
        sources[detector] = source
    return sources


def check_detector(option: str, name: str, detectors: Sequence[str]) -> None:
    """Raise unless there is a detector of that name."""
    if name not in detectors:
        raise QuantError(f'{option}: {name!r} is no detector; expected one of '
                         f'{list(detectors)}.')


def _config_name(name: str) -> str:
    """A float config as commands take it: names of MMDetection stay."""
    return name if not name or '::' in name else os.path.relpath(ROOT / name)


def fetch(detector: str, entry: Entry, folder: Path) -> str:
    """The float checkpoint that a metafile names, downloaded if need be.

    Args:
        detector: its name.
        entry: with an address.
        folder: where a converted file is kept, as ``DETECTOR.pth``.

    Returns:
        A path.

    Raises:
        QuantError: if it cannot be downloaded or converted.
    """
    path = local_checkpoint(entry.address)
    if not entry.converter:
        return str(path)
    converted = folder / f'{detector}.pth'
    if not converted.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ('-m', 'isvit_det', Path(entry.converter).stem)
        argv = [str(path), str(converted), '--config', entry.float_config]
        run_command_line(command, argv)
    return str(converted)

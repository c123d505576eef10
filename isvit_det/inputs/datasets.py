"""Data sets of a config: building, unwrapping, and finding overlaps."""
import copy
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from mmdet.registry import DATASETS

from isvit_det.core.digests import file_hash
from isvit_det.core.errors import QuantError
from isvit_det.inputs.annotations import short
from isvit_det.inputs.data_errors import data_set_error


def dataset_of(loader: Any, name: str) -> Mapping[str, Any]:
    """The data set of a data loader's config.

    Args:
        loader: the config.
        name: key of the config, for messages.

    Raises:
        QuantError: if it has no data set.
    """
    if not isinstance(loader, Mapping) or 'dataset' not in loader:
        raise QuantError(f'{name}: {short(loader)} has no data set; give a '
                         'dict with dataset, the config of one.')
    return _checked(loader['dataset'], f'{name}.dataset')


def _checked(config: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(config, Mapping) or not config:
        raise QuantError(f'{name}: {short(config)} is no data set; give the '
                         "config of one, such as dict(type='CocoDataset', "
                         'ann_file=FILE, ...).')
    return config


def base_datasets(config: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Copies of the configs inside of wrappers (Repeat, Concat, ...).

    Raises:
        QuantError: if a wrapper contains something else.
    """
    inside = f'data set: {config.get("type")}'
    if 'datasets' in config:
        inner = config['datasets']
        if not isinstance(inner, (list, tuple)):
            raise QuantError(f'{inside}.datasets: {short(inner)} is no list; '
                             'give a list of configs of data sets.')
        return [
            base for place, one in enumerate(inner) for base in base_datasets(
                _checked(one, f'{inside}.datasets[{place}]'))
        ]
    if 'dataset' in config:
        return base_datasets(_checked(config['dataset'], f'{inside}.dataset'))
    return [copy.deepcopy(dict(config))]


def build_dataset(config: Dict[str, Any]) -> Any:
    """Build a data set; an empty list if it is empty.

    Raises:
        QuantError: naming the wrong file and its entry.
    """
    try:
        return DATASETS.build(config)
    except FileNotFoundError as error:
        raise QuantError(
            f'data set: {error.filename or error} does not exist; check '
            'data_root and ann_file.') from error
    except ValueError as error:
        # MMEngine raises this if there are no images to concatenate.
        if 'at least one array' in str(error):
            return []
        raise data_set_error(config, error) from error
    # The class may be the user's, and raise any exception.
    except Exception as error:
        raise data_set_error(config, error) from error


def unwrap(dataset: Any) -> List[Any]:
    """The built data sets inside of wrappers (Repeat, Concat, ...)."""
    inner = getattr(dataset, 'datasets', None)
    if inner is None and hasattr(dataset, 'dataset'):
        inner = [dataset.dataset]
    if inner is None:
        return [dataset]
    return [base for part in inner for base in unwrap(part)]


def evaluation_paths(dataset: Any) -> List[Path]:
    """Paths of all images of a built data set, which may be a wrapper."""
    return [
        Path(base.get_data_info(index)['img_path']) for base in unwrap(dataset)
        for index in range(len(base))
    ]


def find_overlap(
        calibration: Sequence[Path],
        evaluation: Sequence[Path]) -> Tuple[List[str], Dict[Path, Path]]:
    """Find evaluation images that are calibration images.

    Images are the same if their resolved paths or their contents are equal.
    Ids are not compared.

    Returns:
        SHA-256 of every calibration image; and for each evaluation image that
        is one of them, the calibration image.

    Raises:
        QuantError: naming an image that is missing.
    """
    resolved = {path.resolve(): path for path in calibration}
    hashes = []
    sizes: Dict[int, Dict[str, Path]] = {}
    for path in calibration:
        size = _size(path)
        hashes.append(file_hash(path))
        sizes.setdefault(size, {})[hashes[-1]] = path
    overlap = {}
    for path in evaluation:
        same = resolved.get(path.resolve())
        if same is None:
            # Only files of equal size need to be read.
            suspects = sizes.get(_size(path))
            same = suspects.get(file_hash(path)) if suspects else None
        if same is not None:
            overlap[path] = same
    return hashes, overlap


def refuse_overlap(calibration: Sequence[Path],
                   evaluation: Sequence[Path]) -> List[str]:
    """Check that no calibration image is an evaluation image.

    Returns:
        SHA-256 of every calibration image.

    Raises:
        QuantError: naming an image that is in both, or that is missing.
    """
    hashes, overlap = find_overlap(calibration, evaluation)
    for path, same in overlap.items():
        raise QuantError(
            f'calibration set: {same} is the evaluation image {path}; '
            'calibrate on images that are not evaluated.')
    return hashes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise QuantError(f'data set: image {path} cannot be read '
                         f'({error.strerror}); check data_prefix.') from error

"""Calibration images: drawn from the training split, none from evaluation."""
import contextlib
import copy
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import torch
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from torch import Tensor

from isvit_det.checkpoint import file_hash
from isvit_det.core.errors import QuantError
from isvit_det.core.files import disk_error
from isvit_det.core.ranks import mine


@contextlib.contextmanager
def reading_images() -> Iterator[None]:
    """Turn what a missing or damaged image raises into a QuantError."""
    try:
        yield
    except (OSError, AssertionError) as error:
        full = disk_error(error)
        if full is not None:
            raise full from error
        # A worker process puts its traceback before the message.
        message = (str(error).strip().splitlines() or [''])[-1]
        if isinstance(error, OSError):
            raise QuantError(f'data set: {message}; check data_root and '
                             'data_prefix.') from error
        # Of mmcv's LoadImageFromFile.
        if 'failed to load image' not in message:
            raise
        raise QuantError(f'data set: {message}; it is damaged, get it '
                         'again.') from error


class Images:
    """Images to calibrate on, numbered from 0."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Dict[str, Any]:
        """What a data loader of batch size 1 would yield for an image.

        Raises:
            QuantError: if it cannot be read, naming it.
        """
        raise NotImplementedError

    def batches(self) -> Iterator[Dict[str, Any]]:
        """Images of this process, read lazily: several share them in turn.

        Raises:
            QuantError: naming what cannot be read.
        """
        return (self.read(index) for index in mine(len(self)))

    def tensors(self, model: Any, mirrored: bool) -> Iterator[Tensor]:
        """Images (1, 3, H, W), preprocessed and padded as at test time.

        Args:
            model: whose preprocessor is used.
            mirrored: append the mirror image of each, padded likewise as
                far as ``img_shape`` leaves out padding.
        """
        for index in mine(len(self) * (1 + mirrored)):
            batch = model.data_preprocessor(
                self.read(index % len(self)), False)
            image = batch['inputs']
            if index >= len(self):
                height, width = batch['data_samples'][0].img_shape[:2]
                inside = image[..., :height, :width]
                inside.copy_(inside.flip(-1))
            yield image


class CalibrationImages(Images):
    """Images of one or more data sets, drawn by seed without replacement.

    Args:
        datasets: built data sets that prepare images as at test time.
        num_images: images to draw; all are taken if there are fewer.
        seed: of the draw.

    Attributes:
        asked: ``num_images``.
        picks: (data set, index in it) of every image drawn.

    Raises:
        QuantError: if the data sets hold no image.
    """

    def __init__(self, datasets: Sequence[Any], num_images: int,
                 seed: int) -> None:
        self.asked = num_images
        every = [(dataset, index) for dataset in datasets
                 for index in range(len(dataset))]
        if not every:
            raise QuantError(
                'calibration set: it is empty; point '
                "train_dataloader.dataset or the hook's calib_dataloader at "
                'images.')
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(every), generator=generator)
        self.picks: List[Tuple[Any, int]] = []
        self._infos: List[Dict[str, Any]] = []
        seen = set()
        for dataset, index in (every[i] for i in order.tolist()):
            if len(self.picks) == num_images:
                break
            info = dataset.get_data_info(index)
            # Data sets may share images; each counts once.
            if info['img_path'] not in seen:
                seen.add(info['img_path'])
                self.picks.append((dataset, index))
                self._infos.append(info)

    def __len__(self) -> int:
        return len(self.picks)

    def paths(self) -> List[Path]:
        """Path of every image drawn."""
        return [Path(info['img_path']) for info in self._infos]

    def ids(self) -> List[Any]:
        """Id of every image drawn, as its data set gives it."""
        return [info.get('img_id') for info in self._infos]

    def names(self) -> List[str]:
        """Path of every image drawn within its data set's image folder."""
        names = []
        for (dataset, _), path in zip(self.picks, self.paths()):
            prefixes = getattr(dataset, 'data_prefix', None) or {}
            folder = Path(prefixes.get('img') or path.parent)
            inside = path.is_relative_to(folder)
            names.append(
                str(path.relative_to(folder)) if inside else path.name)
        return names

    def read(self, index: int) -> Dict[str, Any]:
        dataset, place = self.picks[index]
        with reading_images():
            return pseudo_collate([dataset[place]])


def calibration_images(cfg: Mapping[str, Any], dataset: Any, num_images: int,
                       seed: int) -> CalibrationImages:
    """Draw calibration images for a config.

    Args:
        cfg: a whole MMDetection config.
        dataset: config of a calibration set, or None: the data sets of the
            training split with the test pipeline.
        num_images: images to draw.
        seed: of the draw.

    Raises:
        QuantError: if a data set's files are missing or it is empty.
    """
    if dataset is not None:
        configs = _base_datasets(dataset)
    else:
        if not cfg.get('train_dataloader'):
            raise QuantError('train_dataloader: the config has none to draw '
                             'calibration images from; give the hook a '
                             'calib_dataloader.')
        test = _base_datasets(cfg['test_dataloader']['dataset'])[0]
        configs = _base_datasets(cfg['train_dataloader']['dataset'])
        for config in configs:
            config.update(pipeline=test['pipeline'], test_mode=True)
            config.pop('filter_cfg', None)
    return CalibrationImages([_build(config) for config in configs],
                             num_images, seed)


def _base_datasets(config: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Copies of the data sets that wrappers (Repeat, Concat, ...) hold."""
    if 'datasets' in config:
        return [
            base for inner in config['datasets']
            for base in _base_datasets(inner)
        ]
    if 'dataset' in config:
        return _base_datasets(config['dataset'])
    return [copy.deepcopy(dict(config))]


def _build(config: Dict[str, Any]) -> Any:
    try:
        return DATASETS.build(config)
    except FileNotFoundError as error:
        raise QuantError(
            f'data set: {error.filename or error} does not exist; check '
            'data_root and ann_file.') from error
    except ValueError as error:
        # MMEngine joins the bytes of all images, and there are none.
        if 'at least one array' not in str(error):
            raise
        return []


def unwrap(dataset: Any) -> List[Any]:
    """The built data sets that built wrappers (Repeat, Concat, ...) hold."""
    inner = getattr(dataset, 'datasets', None)
    if inner is None and hasattr(dataset, 'dataset'):
        inner = [dataset.dataset]
    if inner is None:
        return [dataset]
    return [base for part in inner for base in unwrap(part)]


def evaluation_paths(dataset: Any) -> List[Path]:
    """Image paths of a built data set, wrapped ones included."""
    return [
        Path(base.get_data_info(index)['img_path']) for base in unwrap(dataset)
        for index in range(len(base))
    ]


def find_overlap(
        calibration: Sequence[Path],
        evaluation: Sequence[Path]) -> Tuple[List[str], Dict[Path, Path]]:
    """Find evaluation images that are calibration images.

    The same resolved path or the same content counts; ids do not.

    Returns:
        SHA-256 of every calibration image; and the calibration image that
        an evaluation image is, for those that are one.

    Raises:
        QuantError: naming an image that is missing.
    """
    places = {path.resolve(): path for path in calibration}
    hashes = []
    sizes: Dict[int, Dict[str, Path]] = {}
    for path in calibration:
        size = _size(path)
        hashes.append(file_hash(path))
        sizes.setdefault(size, {})[hashes[-1]] = path
    overlap = {}
    for path in evaluation:
        twin = places.get(path.resolve())
        if twin is None:
            # Files of different sizes differ: few need to be read.
            suspects = sizes.get(_size(path))
            twin = suspects.get(file_hash(path)) if suspects else None
        if twin is not None:
            overlap[path] = twin
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
    for path, twin in overlap.items():
        raise QuantError(
            f'calibration set: {twin} is the evaluation image {path}; '
            'calibrate on images that are not evaluated.')
    return hashes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise QuantError(f'data set: image {path} cannot be read '
                         f'({error.strerror}); check data_prefix.') from error

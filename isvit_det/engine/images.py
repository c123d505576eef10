"""Calibration images, drawn from the training split."""
import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor

from isvit_det.core.distributed import own_indices
from isvit_det.core.errors import QuantError, describe_error
from isvit_det.inputs.data_errors import guard_, names, preprocessing
from isvit_det.inputs.datasets import base_datasets, build_dataset, dataset_of


class Images:
    """Base class of calibration images, which are numbered from 0."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Dict[str, Any]:
        """Read an image as a batch of one, as a data loader yields it.

        Raises:
            QuantError: naming the image if it cannot be read.
        """
        raise NotImplementedError

    def batches(self) -> Iterator[Dict[str, Any]]:
        """Batches of one image each, for the images of this process.

        Raises:
            QuantError: naming an image that cannot be read.
        """
        return (self.read(index) for index in own_indices(len(self)))

    def tensors(self, model: Any, mirrored: bool) -> Iterator[Tensor]:
        """Images (1, 3, H, W), preprocessed and padded as at test time.

        Args:
            model: its data preprocessor is used.
            mirrored: append the mirror images of all images. The padding
                outside of ``img_shape`` stays where it is.
        """
        for index in own_indices(len(self) * (1 + mirrored)):
            data = self.read(index % len(self))
            with preprocessing(data):
                batch = model.data_preprocessor(data, False)
            image = batch['inputs']
            if index >= len(self):
                height, width = batch['data_samples'][0].img_shape[:2]
                inside = image[..., :height, :width]
                inside.copy_(inside.flip(-1))
            yield image

    def check(self, model: Any) -> None:
        """Read and preprocess each image of this process once.

        Raises:
            QuantError: naming the first one that cannot be read.
        """
        for _ in self.tensors(model, False):
            pass

    @contextlib.contextmanager
    def naming_failures(self, model: Any) -> Iterator[None]:
        """If this context fails, name the image on which the model fails.

        Raises:
            QuantError: naming that image, if there is one.
        """
        try:
            yield
        except QuantError:
            raise
        except Exception as error:
            for index in own_indices(len(self)):
                batch = self.read(index)
                label = ', '.join(names(batch))
                try:
                    with torch.no_grad():
                        model.test_step(batch)
                except Exception as again:
                    raise QuantError(
                        f'calibration set: image {label}: the detector '
                        f'failed on it ({describe_error(again)}); leave out '
                        'or mend the image.') from error
            raise


class CalibrationImages(Images):
    """A random sample of the images of data sets, without replacement.

    Args:
        datasets: built data sets that prepare images as at test time.
        num_images: number of images to draw; if there are fewer, all.
        seed: of the sample.

    Attributes:
        asked: ``num_images``.
        picks: data set, and index in it, of every image drawn.

    Raises:
        QuantError: if the data sets have no image.
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
        # A data set must not replace an image that it cannot read.
        for dataset in datasets:
            guard_(dataset, may_skip=False)
        self.picks: List[Tuple[Any, int]] = []
        self._infos: List[Dict[str, Any]] = []
        seen = set()
        for dataset, index in (every[i] for i in order.tolist()):
            if len(self.picks) == num_images:
                break
            info = dataset.get_data_info(index)
            # Data sets may share images; each is drawn once.
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
        """Path of every image drawn, relative to its data set's folder."""
        names = []
        for (dataset, _), path in zip(self.picks, self.paths()):
            prefixes = getattr(dataset, 'data_prefix', None) or {}
            folder = Path(prefixes.get('img') or path.parent)
            inside = path.is_relative_to(folder)
            names.append(
                str(path.relative_to(folder)) if inside else path.name)
        return names

    def read(self, index: int) -> Dict[str, Any]:
        dataset, position = self.picks[index]
        return pseudo_collate([dataset[position]])


def calibration_images(cfg: Mapping[str, Any], dataset: Any, num_images: int,
                       seed: int) -> CalibrationImages:
    """Draw calibration images for a config.

    Args:
        cfg: a whole MMDetection config.
        dataset: config of the calibration set; None takes the data sets of
            the training split with the test pipeline.
        num_images: number of images to draw.
        seed: of the sample.

    Raises:
        QuantError: if a data set's files are missing or it is empty.
    """
    if dataset is not None:
        configs = base_datasets(dataset)
    else:
        if not cfg.get('train_dataloader'):
            raise QuantError('train_dataloader: the config has none to draw '
                             'calibration images from; give the hook a '
                             'calib_dataloader.')
        test, *_ = base_datasets(
            dataset_of(cfg['test_dataloader'], 'test_dataloader'))
        configs = base_datasets(
            dataset_of(cfg['train_dataloader'], 'train_dataloader'))
        for config in configs:
            config.update(pipeline=test['pipeline'], test_mode=True)
            config.pop('filter_cfg', None)
            if test.get('return_classes'):
                _take_prompt_(config)
    return CalibrationImages([build_dataset(config) for config in configs],
                             num_images, seed)


def _take_prompt_(config: Dict[str, Any]) -> None:
    """Make a training set return the names of its classes, as a prompt.

    Raises:
        QuantError: if it returns a prompt that predictions cannot use.
    """
    name = str(config.get('type', '')).split('.')[-1]
    if name == 'ODVGDataset':
        raise QuantError(
            f'train_dataloader: an {name} brings no prompt that a prediction '
            "takes; give the hook's calib_dataloader a data set such as "
            'CocoDataset with return_classes=True.')
    config['return_classes'] = True
